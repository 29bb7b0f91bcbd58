"""`delta.publish` against the real controller and fake workers, and what happens when it is killed after each step."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from delta import publish as publish_module
from delta.publish import Publication, find_files, publish
from registry.catalog import Canary, Catalog
from registry.digest import Progress
from registry.errors import AuthenticationError, CheckpointError, InvalidRequestError, UpstreamError
from registry.published_files import PublishedFiles
from registry.store import Store
from tests.controller.conftest import RunningController, StartController
from tests.fakes.fake_variants import FakeVariants, VariantRefused, digest
from tests.fakes.fake_worker import FakeWorker
from tests.fakes.stored_blobs import is_whole, put


class Killed(BaseException):
    pass


@contextlib.contextmanager
def no_bar(description: str) -> Iterator[Progress]:
    yield lambda done, total: None


def adapter(root: Path, text: str) -> Path:
    directory = root / text
    directory.mkdir()
    (directory / "adapter_config.json").write_text("{}")
    (directory / "adapter_model.safetensors").write_text(text * 1000)
    (directory / "optimizer.pt").write_text("not for serving")
    return directory


@pytest.fixture
async def controller(start_controller: StartController, tmp_path: Path) -> RunningController:
    return await start_controller(heartbeat_interval_s=60.0, store=str(tmp_path / "store"))


@pytest.fixture
async def worker(controller: RunningController) -> AsyncIterator[FakeWorker]:
    async with FakeWorker(variants=FakeVariants()) as worker:
        await worker.register(controller.url)
        yield worker


def can_read(worker: FakeWorker, directory: Path, store: Path) -> None:
    """Let a worker have read the files before, as if it had fetched them."""
    digests = {name: put(Store(store), path.read_bytes()).digest for name, path in find_files(directory).items()}
    worker.variants.files[PublishedFiles(digests).manifest_digest] = digest(directory.name)


async def run(
    controller: RunningController, directory: Path, *, kill_at: str | None = None, key: str | None = None,
    timeout_s: float = 20.0, canary: float | None = None, said: list[str] | None = None,
) -> str:  # fmt: skip
    def report(line: str) -> None:
        if said is not None:
            said.append(line)
        if kill_at is not None and kill_at in line:
            raise Killed

    what = Publication("bot", directory, canary=canary)
    return await asyncio.to_thread(
        publish, what, controller.url, key=key, timeout_s=timeout_s, report=report, progress_bar=no_bar
    )


async def test_published_canaried_and_published_again(
    controller: RunningController, worker: FakeWorker, catalog: Catalog, tmp_path: Path
) -> None:
    one, two = adapter(tmp_path, "one"), adapter(tmp_path, "two")
    for directory in (one, two):
        can_read(worker, directory, tmp_path / "elsewhere")
    said: list[str] = []
    assert await run(controller, one, said=said) == "bot@v1"
    assert said == [
        "uploading 2 files, 0.0 MB; 0 are there already", "bot@v1 is version 1 for m",
        *[line for line in said if line.startswith("worker ")], "bot@prod is v1",
    ]  # fmt: skip
    assert await run(controller, two, canary=0.25) == "bot@v2"
    (alias,) = catalog.get_release("bot").aliases
    assert (alias.target.version, alias.canary) == (1, Canary(2, 0.25))
    assert await run(controller, two) == "bot@v2"
    (alias,) = catalog.get_release("bot").aliases
    assert (alias.target.version, alias.canary) == (2, None)


@pytest.mark.parametrize("step", ["uploading", "is version", "worker "])
async def test_a_publisher_that_is_killed_is_started_again(
    controller: RunningController, worker: FakeWorker, catalog: Catalog, tmp_path: Path, step: str
) -> None:
    one, two = adapter(tmp_path, "one"), adapter(tmp_path, "two")
    for directory in (one, two):
        can_read(worker, directory, tmp_path / "elsewhere")
    await run(controller, one)
    with pytest.raises(Killed):
        await run(controller, two, kill_at=step)
    (alias,) = catalog.get_release("bot").aliases
    assert alias.target.version == 1
    assert await run(controller, two) == "bot@v2"
    assert [version.number for version in catalog.get_release("bot").versions] == [1, 2]
    (alias,) = catalog.get_release("bot").aliases
    assert alias.target.version == 2


async def test_large_files_go_in_parts(
    controller: RunningController, worker: FakeWorker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publish_module, "PART_BYTES", 1000)
    one = adapter(tmp_path, "one")
    can_read(worker, one, tmp_path / "elsewhere")
    assert await run(controller, one) == "bot@v1"
    store = Store(tmp_path / "store")
    assert [blob.num_bytes for blob in store.blobs() if is_whole(blob)].count(3000) == 1


async def test_what_goes_wrong_is_said(
    start_controller: StartController, controller: RunningController, worker: FakeWorker, catalog: Catalog,
    tmp_path: Path,
) -> None:  # fmt: skip
    one = adapter(tmp_path, "one")
    with pytest.raises(CheckpointError, match="cannot be served: worker worker-1: there is no adapter at"):
        await run(controller, one)
    worker.variants.refuse["add bot@v1"] = VariantRefused(502, "worker_failed", "the controller broke off")
    with pytest.raises(UpstreamError, match=r"the controller broke off\); run the same command again"):
        await run(controller, one, timeout_s=0.5)
    locked = await start_controller(store=str(tmp_path / "locked"), auth="required")
    with pytest.raises(AuthenticationError):
        await run(locked, one)
    with pytest.raises(InvalidRequestError, match="start it with --store"):
        await run(await start_controller(), one)
    monkey = Publication("bot", tmp_path)
    with pytest.raises(CheckpointError, match="neither a delta"):
        publish(monkey, controller.url, key=None, timeout_s=1, report=print, progress_bar=no_bar)
    with pytest.raises(UpstreamError, match="cannot be reached"):
        publish(
            Publication("bot", one), "http://127.0.0.1:9", key=None, timeout_s=1, report=print, progress_bar=no_bar,
            sleep=lambda _: None, clock=itertools.count(0.0, 2.0).__next__,
        )  # fmt: skip

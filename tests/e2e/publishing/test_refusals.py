"""Deltas that workers refuse, and releases whose versions go bad later: clients do not notice."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from delta.artifact import TENSORS_FILE
from delta.delta_config import CONFIG_FILE
from delta.publish import Publication, publish
from registry.digest import Progress
from registry.errors import CheckpointError
from registry.published_files import PublishedFiles
from tests.e2e.processes import wait_until
from tests.e2e.publishing.fleet import RELEASE, WAIT_S, Fleet
from tests.e2e.spoiled_deltas import of_another_base, truncated, with_another_probe, with_nan

pytestmark = pytest.mark.e2e


@contextlib.contextmanager
def no_bar(description: str) -> Iterator[Progress]:
    yield lambda done, total: None


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [(of_another_base, "base"), (truncated, "truncated"), (with_nan, "finite"), (with_another_probe, "probe")],
)
def test_what_workers_refuse_fails_and_the_old_version_goes_on(
    fleet: Fleet, tmp_path: Path, spoil: Callable[[Path, Path], None], reason: str
) -> None:
    """The command would find most of it before it sends anything; this publisher does not look."""
    spoil(fleet.fine_tunes.delta("sign"), tmp_path / "bad")
    old = fleet.current()
    with fleet.clients() as clients:
        with pytest.raises(CheckpointError, match=rf"cannot be served.*{reason}"):
            publish(
                Publication(RELEASE, tmp_path / "bad"), fleet.gate.url,
                key=None, timeout_s=300, report=print, progress_bar=no_bar,
            )  # fmt: skip
        clients.wait_for(fleet.serving)
        assert set(clients.outcomes()) == {fleet.serving}
    version = fleet.versions()[max(fleet.versions())]
    assert version["state"] == "failed"
    assert reason in version["error"]
    assert fleet.current() == old
    assert fleet.complete(version["name"]).status_code == 404


def cached(fleet: Fleet, number: int, version: int) -> Path:
    """Where a worker keeps the files of a version."""
    files = PublishedFiles(fleet.versions()[version]["files"])
    return fleet.caches[number] / "rootgraft" / "variants" / files.manifest_digest.removeprefix("sha256:")


def test_a_canary_that_fails_its_requests_is_aborted(fleet: Fleet) -> None:
    """Its files are damaged on both workers' disks when they have to be read again."""
    stable, canary = fleet.current(), fleet.other_version()
    fleet.admin("PUT", "/aliases/prod/canary", version=canary, weight=0.0)
    for number in range(2):
        file = cached(fleet, number, canary) / TENSORS_FILE
        data = file.read_bytes()
        file.unlink()  # the blob itself stays as it is
        file.write_bytes(data[:-1000])
    fleet.evict(canary)
    with fleet.clients() as clients:
        clients.wait_for(fleet.serving)
        fleet.admin("PUT", "/aliases/prod/canary", version=canary, weight=1.0)
        wait_until(lambda: fleet.alias()["canary"]["weight"] == 0.0, WAIT_S, "the abort")
        clients.wait_for(fleet.serving)
        assert set(clients.outcomes()) == {fleet.serving}
    (move, *_) = fleet.admin("GET", "/aliases/prod/history")["moves"]
    assert "requests failed" in move["detail"]["reason"]
    assert fleet.current() == stable
    fleet.admin("DELETE", "/aliases/prod/canary")
    for number in range(2):
        shutil.rmtree(cached(fleet, number, canary))
    fleet.wait_until_served(canary)


def test_a_canary_whose_probe_fails_on_a_new_worker_is_aborted(fleet: Fleet, tmp_path: Path) -> None:
    """As if that worker computed it otherwise: the probe that it finds expects something else."""
    if fleet.serving == "sign":
        fleet.admin("PUT", "/aliases/prod", version=fleet.other_version())
    canary = fleet.other_version()
    fleet.admin("PUT", "/aliases/prod/canary", version=canary, weight=0.5)
    fleet.kill_worker(1)
    directory = cached(fleet, 1, canary)
    with_another_probe(directory, tmp_path / "bad")
    (directory / CONFIG_FILE).unlink()
    shutil.copyfile(tmp_path / "bad" / CONFIG_FILE, directory / CONFIG_FILE)
    with fleet.clients("stream ended: worker_failed"):
        fleet.start_worker(1)
        wait_until(lambda: fleet.alias()["canary"]["weight"] == 0.0, WAIT_S, "the abort")
    (move, *_) = fleet.admin("GET", "/aliases/prod/history")["moves"]
    assert "probe" in move["detail"]["reason"]
    fleet.admin("DELETE", "/aliases/prod/canary")
    shutil.rmtree(directory)
    fleet.wait_until_served(canary)

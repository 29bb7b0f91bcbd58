from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from controller.protocol import AddVariantRequest, VersionsReply
from model_worker.adapter_root import AdapterRoot
from model_worker.published_variants import PublishedVariants
from model_worker.variants import Variants
from registry.errors import ModelNotFoundError, UpstreamError
from registry.published_files import PublishedFiles
from registry.store import Store
from tests.fakes.byte_tokenizer import ByteTokenizer
from tests.fakes.fake_loras import FakeLoras
from tests.fakes.load_plans import make_plan
from tests.fakes.stored_blobs import put

CONFIG, WEIGHTS = b'{"r": 8}', bytes(range(256)) * 300


class BlobServer(ThreadingHTTPServer):
    """The half of a controller that workers fetch files from.

    Attributes:
        blobs: by digest.
        asked: (digest, Range header) in order.
        published: manifest digests of the catalog's versions.
    break_after: bytes after which the next answer breaks off.
    """

    def __init__(self) -> None:
        self.blobs: dict[str, bytes] = {}
        self.asked: list[tuple[str, str | None]] = []
        self.break_after: int | None = None
        self.published: list[str] = []
        super().__init__(("127.0.0.1", 0), _Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: BlobServer

    def do_GET(self) -> None:
        if self.path == "/internal/versions":
            self._answer(200, VersionsReply(manifest_digests=self.server.published).model_dump_json().encode())
            return
        digest, range_header = self.path.rpartition("/")[2], self.headers["range"]
        self.server.asked.append((digest, range_header))
        if digest not in self.server.blobs:
            body, status = b'{"code": "model_not_found", "message": "it is not in the store"}', 404
        else:
            start = 0 if range_header is None else int(range_header.removeprefix("bytes=").rstrip("-"))
            body, status = self.server.blobs[digest][start:], 200 if range_header is None else 206
        self._answer(status, body)

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        if self.server.break_after is not None:
            body, self.server.break_after = body[: self.server.break_after], None
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[BlobServer]:
    with BlobServer() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def files(server: BlobServer, tmp_path: Path) -> PublishedFiles:
    store = Store(tmp_path / "of the controller")
    digests = {}
    for name, data in (("adapter_config.json", CONFIG), ("files/weights.safetensors", WEIGHTS)):
        digests[name] = put(store, data).digest
        server.blobs[digests[name]] = data
    return PublishedFiles(digests)


def names_in(directory: Path) -> list[str]:
    return [path.name for path in directory.iterdir() if path.name != ".lock"]


def contents(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }


def test_a_version_is_fetched_once_and_found_again(server: BlobServer, files: PublishedFiles, tmp_path: Path) -> None:
    directory = PublishedVariants(tmp_path / "cache", server.url, None).fetch(files)
    assert contents(directory) == {"adapter_config.json": CONFIG, "files/weights.safetensors": WEIGHTS}
    assert directory.name == files.manifest_digest.removeprefix("sha256:")
    assert len(server.asked) == 2
    nowhere = PublishedVariants(tmp_path / "cache", "http://127.0.0.1:9", None)
    assert nowhere.fetch(files) == directory
    other = PublishedFiles({"adapter_config.json": files.digests["adapter_config.json"]})
    assert contents(nowhere.fetch(other)) == {"adapter_config.json": CONFIG}
    assert len(server.asked) == 2


def test_what_breaks_off_is_continued(server: BlobServer, files: PublishedFiles, tmp_path: Path) -> None:
    only = PublishedFiles({"adapter_config.json": files.digests["files/weights.safetensors"]})
    published = PublishedVariants(tmp_path, server.url, None)
    server.break_after = 30_000
    with pytest.raises(UpstreamError, match="cannot be fetched from the controller"):
        published.fetch(only)
    assert not names_in(tmp_path / "variants")
    assert contents(published.fetch(only)) == {"adapter_config.json": WEIGHTS}
    assert server.asked[0][1] is None
    assert server.asked[1][1] in ("bytes=30000-", None)  # None: what had come was less than a piece


def test_other_bytes_are_refused_and_fetched_again(server: BlobServer, files: PublishedFiles, tmp_path: Path) -> None:
    digest = files.digests["adapter_config.json"]
    right, server.blobs[digest] = server.blobs[digest], b"other bytes"
    published = PublishedVariants(tmp_path, server.url, None)
    with pytest.raises(UpstreamError, match="sent other bytes"):
        published.fetch(files)
    server.blobs[digest] = right
    assert contents(published.fetch(files))["adapter_config.json"] == CONFIG


def test_a_file_that_nobody_has(server: BlobServer, files: PublishedFiles, tmp_path: Path) -> None:
    server.blobs.clear()
    with pytest.raises(ModelNotFoundError, match="not in the store"):
        PublishedVariants(tmp_path, server.url, None).fetch(files)
    with pytest.raises(UpstreamError, match="cannot be reached"):
        PublishedVariants(tmp_path, "http://127.0.0.1:9", None).fetch(files)


def test_workers_of_one_machine_fetch_together(server: BlobServer, files: PublishedFiles, tmp_path: Path) -> None:
    found: list[Path] = []

    def fetch() -> None:
        found.append(PublishedVariants(tmp_path, server.url, None).fetch(files))

    threads = [threading.Thread(target=fetch) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 6
    assert len(set(found)) == 1
    assert len(server.asked) == 2
    assert names_in(tmp_path / "variants") == [found[0].name]


def test_what_the_catalog_does_not_have_is_removed_when_nobody_uses_it(
    server: BlobServer, files: PublishedFiles, tmp_path: Path
) -> None:
    other = PublishedFiles({"adapter_config.json": files.digests["adapter_config.json"]})
    mine, theirs = (PublishedVariants(tmp_path, server.url, None) for _ in range(2))
    directories = {mine.fetch(files), mine.fetch(other)}
    theirs.fetch(files)
    mine.clean()
    assert {tmp_path / "variants" / name for name in names_in(tmp_path / "variants")} == directories
    mine.release(directories)
    mine.clean()
    assert names_in(tmp_path / "variants") == [mine.path(files).name], "another process uses it"
    assert contents(mine.path(files)) == {"adapter_config.json": CONFIG, "files/weights.safetensors": WEIGHTS}
    server.published = [files.manifest_digest]
    theirs.release([mine.path(files)])
    theirs.clean()
    assert names_in(tmp_path / "variants") == [mine.path(files).name], "the catalog has it"
    server.published = []
    theirs.clean()
    assert names_in(tmp_path / "variants") == []
    assert list(Store(tmp_path / "store").blobs()) == []


def test_cleaning_does_not_disturb_those_who_fetch(server: BlobServer, files: PublishedFiles, tmp_path: Path) -> None:
    published = PublishedVariants(tmp_path, server.url, None)
    weights = files.digests["files/weights.safetensors"]
    data = server.blobs.pop(weights)
    with pytest.raises(ModelNotFoundError):
        published.fetch(files)
    left = tmp_path / "variants" / ".tmp-of-one-that-was-killed"
    left.mkdir()
    published.clean()
    assert not left.exists()
    server.blobs[weights] = data
    published.fetch(files)
    assert [digest for digest, _ in server.asked].count(files.digests["adapter_config.json"]) == 1, "it was kept"
    PublishedVariants(tmp_path, "http://127.0.0.1:9", None).clean()  # nobody to ask: nothing is removed
    assert names_in(tmp_path / "variants") == [published.path(files).name]


async def test_files_of_a_version_go_when_it_was_removed_and_its_requests_have_ended(
    server: BlobServer, files: PublishedFiles, tmp_path: Path
) -> None:
    engine = FakeLoras()
    variants = Variants(
        engine, make_plan(), ByteTokenizer(), parent="base", root=AdapterRoot(None), with_templates=True,
        published=PublishedVariants(tmp_path, server.url, None),
    )  # fmt: skip
    path = files.manifest_digest
    await variants.add(AddVariantRequest(name="bot@v1", parent="base", path=path, files=dict(files.digests)))
    (used,) = await engine.list()
    await variants.remove("bot@v1")
    engine._statuses["bot@v1"] = dataclasses.replace(used, state="draining")
    await variants.statuses()
    assert variants._cleaning is None, "a request still uses it"
    engine._statuses.clear()
    assert await variants.statuses() == []
    assert variants._cleaning is not None
    await variants._cleaning
    assert names_in(tmp_path / "variants") == []

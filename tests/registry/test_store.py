from __future__ import annotations

import errno
import hashlib
import os
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

from registry.errors import InternalError, InvalidRequestError
from registry.store import Store
from tests.fakes.stored_blobs import digest_of, put, put_pieces


def files_below(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*") if path.is_file())


def test_put_get_and_layout(tmp_path: Path) -> None:
    store = Store(tmp_path)
    blob = put_pieces(store, [b"hello ", b"", b"world"])
    hex_digits = hashlib.sha256(b"hello world").hexdigest()
    assert blob.digest == f"sha256:{hex_digits}"
    assert blob.path == tmp_path / "blobs" / "sha256" / hex_digits[:2] / hex_digits
    assert blob.num_bytes == 11
    assert blob.path.read_bytes() == b"hello world"
    assert blob.path.stat().st_mode & 0o222 == 0
    assert store.get(blob.digest) == blob
    assert blob.digest in store
    assert files_below(tmp_path) == [blob.path]


@settings(max_examples=25, deadline=None)
@given(chunks=st.lists(st.binary(max_size=50), max_size=6))
def test_the_name_is_the_hash_however_the_bytes_arrive(
    tmp_path_factory: pytest.TempPathFactory, chunks: list[bytes]
) -> None:
    store = Store(tmp_path_factory.mktemp("store"))
    blob = put_pieces(store, chunks)
    assert blob.path.read_bytes() == b"".join(chunks)
    assert blob.num_bytes == len(b"".join(chunks))


def test_what_is_there_is_not_written_again(tmp_path: Path) -> None:
    store = Store(tmp_path)
    first = put(store, b"content")
    with store.receive(first.digest) as receiver:
        assert receiver.complete
    assert list(store.blobs()) == [put(store, b"content")] == [first]


def test_listing_is_sorted_and_leaves_out_what_is_being_written(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert list(store.blobs()) == []
    digests = sorted(put(store, bytes([n])).digest for n in range(20))
    with store.receive(digest_of(b"whole")) as receiver:
        receiver.write(b"who")
        assert [blob.digest for blob in store.blobs()] == digests
        assert len(files_below(tmp_path)) == len(digests) + 1
        receiver.write(b"le")
        receiver.finish()
    assert len(list(store.blobs())) == len(digests) + 1


@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_disk_full_is_one_message_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(*((os, "fsync", full) if call == "fsync" else (Path, "rename", full)))
    with pytest.raises(InternalError, match=r"^no space left on the disk of .* MB free\); free some and try again$"):
        put(Store(tmp_path), b"x" * 100)
    monkeypatch.undo()
    assert files_below(tmp_path) == []


def test_root_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(InternalError, match="cannot write below"):
        put(Store(tmp_path / "file"), b"x")


def test_concurrent_puts_of_the_same_content(tmp_path: Path) -> None:
    store = Store(tmp_path)
    together = threading.Barrier(8)
    found: list[str] = []

    def put_with_others() -> None:
        together.wait(timeout=30)
        found.append(put(store, b"same content").digest)

    threads = [threading.Thread(target=put_with_others) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [digest_of(b"same content")] * 8
    assert len(files_below(tmp_path)) == 1


def test_delete(tmp_path: Path) -> None:
    store = Store(tmp_path)
    kept, gone = put(store, b"kept"), put(store, b"gone")
    store.delete(gone.digest)
    assert list(store.blobs()) == [kept]
    for call in (store.get, store.delete):
        with pytest.raises(InvalidRequestError, match="is not in the store"):
            call(gone.digest)


@pytest.mark.parametrize("digest", ["", "sha256:../../etc/passwd", "sha256:" + "A" * 64, "md5:" + "a" * 64, "a" * 64])
def test_a_digest_is_never_a_path(tmp_path: Path, digest: str) -> None:
    with pytest.raises(InvalidRequestError, match="is no digest"):
        Store(tmp_path).get(digest)


def test_only_old_abandoned_files_are_removed(tmp_path: Path) -> None:
    store = Store(tmp_path)
    blob = put(store, b"kept")
    directory = blob.path.parent.parent
    old, new = directory / ".tmp-old", directory / ".tmp-new"
    for path, modified in ((old, 1000), (new, 5000)):
        path.write_bytes(b"half")
        os.utime(path, (modified, modified))
    assert store.remove_abandoned(3600, now=lambda: 6000) == 1
    assert files_below(tmp_path) == sorted([new, blob.path])

"""Content-addressed store: a file's name is the SHA-256 of its bytes.

    root/blobs/sha256/ab/abcdef…64 hex digits     complete, read-only, never changed
    root/blobs/sha256/.tmp-…                      being written; moved into place by a rename in the same file system

A blob is visible only when all of it is on the disk. Of several writers of the same content one writes at a time, see
registry.blob_receiver. Nothing is deleted unless `delete` is called for it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path

from registry.atomic_file import TEMPORARY_PREFIX, sync_directory, temporary_file
from registry.blob_receiver import BlobReceiver, partial_path, receiving
from registry.errors import InvalidRequestError
from registry.names import is_digest


@dataclass(frozen=True, slots=True)
class Blob:
    """One stored file: its digest ("sha256:…"), where it is, and its size."""

    digest: str
    path: Path
    num_bytes: int


class Store:
    """The store under one root directory; any number of processes may share it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._blobs = root / "blobs" / "sha256"

    def check_writable(self) -> None:
        """Make the store's directories. Raises InternalError if nothing can be written there."""
        with temporary_file(self._blobs):
            pass

    def receive(self, digest: str, *, wait: bool = False) -> AbstractContextManager[BlobReceiver]:
        """Receive a blob whose digest is known, going on where a sender broke off. Args and Raises: as `receiving`."""
        return receiving(digest, self._location(digest), self._blobs, wait=wait)

    def num_bytes_received(self, digest: str) -> int:
        """Of a blob on its way, or in the store."""
        for path in (self._location(digest), partial_path(digest, self._blobs)):
            with suppress(FileNotFoundError):
                return path.stat().st_size
        return 0

    def get(self, digest: str) -> Blob:
        """The blob of that digest; raises InvalidRequestError when it is not in the store."""
        path = self._location(digest)
        try:
            return Blob(digest, path, path.stat().st_size)
        except FileNotFoundError:
            raise InvalidRequestError(f"{digest} is not in the store") from None

    def __contains__(self, digest: str) -> bool:
        return self._location(digest).exists()

    def blobs(self) -> Iterator[Blob]:
        """Every complete blob, in the order of the digests."""
        for directory in sorted(self._blobs.glob("[0-9a-f][0-9a-f]")):
            for path in sorted(directory.iterdir()):
                digest = f"sha256:{path.name}"
                if is_digest(digest):
                    yield Blob(digest, path, path.stat().st_size)

    def delete(self, digest: str) -> None:
        """Remove one blob to which nothing refers any more; raises InvalidRequestError when absent."""
        blob = self.get(digest)
        blob.path.unlink(missing_ok=True)
        sync_directory(blob.path.parent)

    def remove_abandoned(self, older_than_s: float, now: Callable[[], float] = time.time) -> int:
        """Remove what killed writers left half-written, if untouched for `older_than_s` seconds; return how many."""
        removed = 0
        for path in self._blobs.glob(f"{TEMPORARY_PREFIX}*"):
            if now() - path.stat().st_mtime > older_than_s:
                path.unlink(missing_ok=True)
                removed += 1
        return removed

    def _location(self, digest: str) -> Path:
        if not is_digest(digest):
            raise InvalidRequestError(f"{digest[:80]!a} is no digest: give sha256: and 64 lower-case hex digits")
        hex_digits = digest.removeprefix("sha256:")
        return self._blobs / hex_digits[:2] / hex_digits

"""Receiving a blob piece by piece: what has come stays when the sender breaks off, and is continued.

    root/blobs/sha256/.tmp-part-…64 hex digits     what has come so far; its bytes in order, locked by who writes it

Whoever holds the lock may write. It goes with its holder, however that ends, and the next one continues.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from registry.atomic_file import TEMPORARY_PREFIX, disk_errors, publish
from registry.errors import InvalidRequestError, OverloadedError, ServerError

_RETRY_AFTER_S = 2.0


class BlobReceiver:
    """The bytes of one blob, as far as they have come. `write` them all, then `finish`.

    Attributes:
        complete: the blob is in the store; nothing is to be written.
        num_bytes: that are there.
    """

    def __init__(self, digest: str, file: BinaryIO, partial: Path, destination: Path) -> None:
        self.complete = destination.exists()
        self._digest = digest
        self._file = file
        self._partial = partial
        self._destination = destination
        self.num_bytes = file.seek(0, os.SEEK_END)
        # What came earlier is read once, at the end, for it may come in many parts.
        self._hasher = None if self.num_bytes else hashlib.sha256()
        self._kept = not self.complete
        self._moved = False

    def write(self, chunk: bytes) -> None:
        """Raises InternalError: the disk is full or cannot be written; what had come is given up."""
        try:
            with disk_errors(self._partial.parent):
                self._file.write(chunk)
                self._file.flush()
        except ServerError:
            self._kept = False
            raise
        if self._hasher is not None:
            self._hasher.update(chunk)
        self.num_bytes += len(chunk)

    def restart(self) -> None:
        """Forget what had come."""
        with disk_errors(self._partial.parent):
            self._file.seek(0)
            self._file.truncate()
        self._hasher, self.num_bytes = hashlib.sha256(), 0

    def give_up(self) -> None:
        """Keep nothing of it."""
        self._kept = False

    def finish(self) -> None:
        """Make it a blob of the store.

        Raises:
            InvalidRequestError: these are not the bytes of its digest; they are given up.
            InternalError: as `write`.
        """
        found = f"sha256:{self._hexdigest()}"
        self._kept = False
        if found != self._digest:
            raise InvalidRequestError(
                f"the {self.num_bytes} bytes that were sent as {self._digest} hash to {found}; send it again"
            )
        publish(self._file, self._partial, self._destination, mode=0o444)
        self.complete = self._moved = True

    def _hexdigest(self) -> str:
        if self._hasher is not None:
            return self._hasher.hexdigest()
        self._file.seek(0)
        return hashlib.file_digest(self._file, "sha256").hexdigest()  # type: ignore[arg-type]  # it reads and writes

    def close(self) -> None:
        if not self._moved and (not self._kept or not self.num_bytes):
            self._partial.unlink(missing_ok=True)


def partial_path(digest: str, directory: Path) -> Path:
    """Where what has come of a blob is."""
    return directory / f"{TEMPORARY_PREFIX}part-{digest.removeprefix('sha256:')}"


@contextmanager
def receiving(digest: str, destination: Path, directory: Path, *, wait: bool) -> Iterator[BlobReceiver]:
    """Receive the blob `digest` into `destination`; only one process at a time does.

    Args:
        directory: of what is on its way, in the same file system.
        wait: while another one receives it; else that is an error.

    Raises:
        OverloadedError: another one receives it.
        InternalError: the directory cannot be written.
    """
    partial = partial_path(digest, directory)
    with disk_errors(directory):
        directory.mkdir(parents=True, exist_ok=True)
        file = _open_locked(partial, wait=wait)
    if file is None:
        raise OverloadedError(f"{digest} is being received already; try again", retry_after_s=_RETRY_AFTER_S)
    with file:
        receiver = BlobReceiver(digest, file, partial, destination)
        try:
            yield receiver
        finally:
            receiver.close()


def _open_locked(path: Path, *, wait: bool) -> BinaryIO | None:
    """The file under `path` with the lock on it; None: somebody else has it."""
    while True:
        file = path.open("a+b")
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(file, path):
                return file
        except BlockingIOError:
            file.close()
            return None
        except BaseException:
            file.close()
            raise
        file.close()  # whoever had the lock has moved or removed the file


def _is_at(file: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False

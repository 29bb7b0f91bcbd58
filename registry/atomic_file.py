"""Writing a file so that other processes, and a machine that crashes, see all of it or nothing."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from registry.errors import InternalError

TEMPORARY_PREFIX = ".tmp-"


@contextmanager
def temporary_file(directory: Path) -> Iterator[tuple[BinaryIO, Path]]:
    """A new file in `directory` for `publish` to move into place; removed at the end if it was not.

    Raises:
        InternalError: the disk is full, or the directory cannot be written.
    """
    with disk_errors(directory):
        directory.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=TEMPORARY_PREFIX, dir=directory)
    temporary = Path(name)
    file = os.fdopen(descriptor, "wb")
    try:
        yield file, temporary
    finally:
        # Closing flushes again what could not be flushed before; `publish` has already reported that error.
        with suppress(OSError):
            file.close()
        temporary.unlink(missing_ok=True)


def publish(file: BinaryIO, temporary: Path, destination: Path, *, mode: int = 0o644) -> None:
    """Flush `file` to the disk, rename it to `destination` in the same file system, and flush the directory entry.

    Raises:
        InternalError: the disk is full, or the directory cannot be written.
    """
    with disk_errors(destination.parent):
        file.flush()
        os.fchmod(file.fileno(), mode)
        os.fsync(file.fileno())
        if not destination.parent.is_dir():
            destination.parent.mkdir(parents=True, exist_ok=True)
            sync_directory(destination.parent.parent)
        temporary.rename(destination)
        sync_directory(destination.parent)


def write_file(destination: Path, data: bytes) -> None:
    """Put `data` at `destination` in one step, replacing what was there; raises InternalError as `publish` does."""
    with temporary_file(destination.parent) as (file, temporary):
        with disk_errors(destination.parent):
            file.write(data)
        publish(file, temporary, destination)


def sync_directory(directory: Path) -> None:
    """Make the names in `directory` survive a power failure."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def disk_errors(where: Path) -> Iterator[None]:
    """Turn the operating system's errors about writing below `where` into one clear InternalError."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise InternalError(
                f"no space left on the disk of {where}{_free(where)}; free some and try again"
            ) from error
        raise InternalError(f"cannot write below {where}: {error.strerror or error}; check the directory") from error


def _free(where: Path) -> str:
    with suppress(OSError):
        status = os.statvfs(next(path for path in (where, *where.parents) if path.exists()))
        return f" ({status.f_bavail * status.f_frsize / 1e6:.0f} MB free)"
    return ""

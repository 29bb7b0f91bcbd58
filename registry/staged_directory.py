"""A directory that appears complete or not at all."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from registry.atomic_file import disk_errors, sync_directory
from registry.errors import CheckpointError, RootgraftError

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


@contextmanager
def staged_directory(target: Path, *, replaces: Collection[str] = ()) -> Iterator[Path]:
    """Yield an empty directory beside `target` to be filled; on a normal exit it is synced and renamed to `target`.

    On an error it is removed and `target` is as it was. A program killed in between leaves only `.NAME.XXXX.partial`.

    Args:
        replaces: a directory that is there and holds a file of such a name is replaced, in one step.

    Raises:
        CheckpointError: `target` exists already, or its parent does not.
        InternalError: the disk is full, or the directory cannot be written.
    """
    check_target(target, replaces)
    with disk_errors(target.parent):
        staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
        try:
            yield staging
            _publish(staging, target, replaces)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


@dataclass(frozen=True, slots=True)
class ResumableDirectory:
    """Attributes:
    scratch: what the work has come to so far; kept if the program is killed or interrupted.
    result: an empty directory, which becomes the target.
    """

    scratch: Path
    result: Path


@contextmanager
def resumable_directory(target: Path, *, replaces: Collection[str] = ()) -> Iterator[ResumableDirectory]:
    """As `staged_directory`, for long work: `.NAME.partial` stays if the program is killed, and is yielded again.

    Raises:
        CheckpointError: `target` exists already, its parent does not, or another program is writing it.
        InternalError: the disk is full (everything is removed), or the directory cannot be written.
    """
    check_target(target, replaces)
    scratch = scratch_directory(target)
    staging = scratch.parent
    made = ResumableDirectory(scratch, staging / "result")
    with disk_errors(target.parent):
        staging.mkdir(exist_ok=True)
        lock = os.open(staging, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            made.scratch.mkdir(exist_ok=True)
            shutil.rmtree(made.result, ignore_errors=True)
            made.result.mkdir()
            yield made
            _publish(made.result, target, replaces)
            shutil.rmtree(staging, ignore_errors=True)
        except BlockingIOError as error:
            raise CheckpointError(f"another program is writing {target}; wait for it") from error
        except (RootgraftError, OSError):
            shutil.rmtree(staging, ignore_errors=True)
            raise
        finally:
            os.close(lock)


def scratch_directory(target: Path) -> Path:
    """Where the work for a `resumable_directory` keeps what it has come to, while there is any."""
    return target.with_name(f".{target.name}.partial") / "scratch"


def check_target(target: Path, replaces: Collection[str]) -> None:
    """Raises CheckpointError: `target` cannot be made or replaced, as `staged_directory` says it."""
    if target.is_dir() and not target.is_symlink() and any((target / name).is_file() for name in replaces):
        return
    _refuse_existing(target)
    if not target.parent.is_dir():
        raise CheckpointError(f"{target.parent} does not exist; create it first")


def _refuse_existing(target: Path) -> None:
    if target.exists() or target.is_symlink():
        raise CheckpointError(f"{target} exists already; remove it or give another name")


def _publish(staging: Path, target: Path, replaces: Collection[str]) -> None:
    for path in [*staging.rglob("*"), staging]:
        _sync(path)
    staging.chmod(0o755)
    if replaces and target.exists():
        check_target(target, replaces)
        _exchange(staging, target)
        shutil.rmtree(staging)
    else:
        # rename() replaces an empty directory silently, so one that somebody made meanwhile is looked for again.
        _refuse_existing(target)
        staging.rename(target)
    sync_directory(target.parent)


def _exchange(staging: Path, target: Path) -> None:
    """Swap two directories in one step, where the system can; else in two, between which `target` is missing."""
    libc = ctypes.CDLL(None, use_errno=True)
    if hasattr(libc, "renameat2"):
        if libc.renameat2(_AT_FDCWD, os.fsencode(staging), _AT_FDCWD, os.fsencode(target), _RENAME_EXCHANGE) == 0:
            return
        number = ctypes.get_errno()
        if number not in (errno.EINVAL, errno.ENOSYS):
            raise OSError(number, os.strerror(number), str(target))
    old = staging.with_name(f"{staging.name}.old")
    target.rename(old)
    staging.rename(target)
    old.rename(staging)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

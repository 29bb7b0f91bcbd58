"""A directory that appears complete or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from registry.atomic_file import disk_errors, sync_directory
from registry.errors import CheckpointError


@contextmanager
def staged_directory(target: Path) -> Iterator[Path]:
    """Yield an empty directory beside `target` to be filled; on a normal exit it is synced and renamed to `target`.

    On an error it is removed and `target` is not there. A program killed in between leaves only `.NAME.XXXX.partial`.

    Raises:
        CheckpointError: `target` exists already, or its parent does not.
        InternalError: the disk is full, or the directory cannot be written.
    """
    _refuse_existing(target)
    if not target.parent.is_dir():
        raise CheckpointError(f"{target.parent} does not exist; create it first")
    with disk_errors(target.parent):
        staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
        try:
            yield staging
            for path in [*staging.rglob("*"), staging]:
                _sync(path)
            staging.chmod(0o755)
            # rename() replaces an empty directory silently, so one that somebody made meanwhile is looked for again.
            _refuse_existing(target)
            staging.rename(target)
            sync_directory(target.parent)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise


def _refuse_existing(target: Path) -> None:
    if target.exists() or target.is_symlink():
        raise CheckpointError(f"{target} exists already; remove it or give another name")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""A file system of a chosen size, to be full when a test wants it."""

from __future__ import annotations

import os
import subprocess
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest

PLENTY_BYTES = 1 << 30  # of memory, as far as they are used


class SmallDisk:
    """A tmpfs at `path` while the context lasts; an ordinary directory where nothing can be mounted."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.is_mounted = False

    def __enter__(self) -> Self:
        with suppress(OSError):
            command = ["mount", "-t", "tmpfs", "-o", f"size={PLENTY_BYTES}", "rootgraft-test", str(self.path)]
            self.is_mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.is_mounted:
            subprocess.run(["umount", "--lazy", str(self.path)], check=True)

    def leave(self, num_bytes: int) -> None:
        """Let no more than that, rounded up to pages, be free.

        Skips the test where nothing can be mounted.
        """
        if not self.is_mounted:
            pytest.skip("this user cannot mount a file system (tmpfs), so none can be full")
        self._resize(_used_bytes(self.path) + num_bytes)

    def grow(self) -> None:
        """Free enough again."""
        self._resize(PLENTY_BYTES)

    def _resize(self, num_bytes: int) -> None:
        subprocess.run(["mount", "-o", f"remount,size={num_bytes}", str(self.path)], check=True)


def _used_bytes(path: Path) -> int:
    status = os.statvfs(path)
    return (status.f_blocks - status.f_bfree) * status.f_frsize

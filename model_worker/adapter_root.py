"""The directory below which adapters named over HTTP must be."""

from __future__ import annotations

import os
from pathlib import Path

from registry.errors import CheckpointError, InvalidRequestError, PermissionDeniedError


class AdapterRoot:
    """Turns a path that came over HTTP into one that may be read.

    Args:
        directory: of --adapter-root; None: nothing may be read.
    """

    def __init__(self, directory: Path | None) -> None:
        self._directory = None if directory is None else directory.resolve(strict=True)

    def find(self, path: str) -> Path:
        """The adapter directory `path`, absolute or relative to the root, without any symbolic link in it.

        Links may be followed, also those of files in the directory, as long as they lead to somewhere below the root.

        Raises:
            PermissionDeniedError: there is no root, or the path or one of its files is outside of it.
            InvalidRequestError: no file system can have such a path.
            CheckpointError: there is no such directory.
        """
        if self._directory is None:
            raise PermissionDeniedError(
                "This worker reads no adapters that are named over HTTP; start it with --adapter-root DIR, or give it "
                "the adapter with --lora NAME=PATH.",
                param="path",
            )
        try:
            found = (self._directory / path).resolve()
            self._check_below(found, path)
            if not found.is_dir():
                raise CheckpointError(
                    f"{path} is no directory below this worker's --adapter-root; check the path.", param="path"
                )
            for entry in os.scandir(found):
                self._check_below(Path(entry.path).resolve(), f"{path}/{entry.name}")
        except (OSError, ValueError, RuntimeError) as error:  # a loop of links; a NUL; a name that is too long
            reason = getattr(error, "strerror", None) or str(error)
            raise InvalidRequestError(f"{path!r} cannot be read: {reason}.", param="path") from error
        return found

    def _check_below(self, resolved: Path, given: str) -> None:
        assert self._directory is not None
        if not resolved.is_relative_to(self._directory):
            raise PermissionDeniedError(
                f"{given} is not below this worker's --adapter-root; copy the adapter there.", param="path"
            )

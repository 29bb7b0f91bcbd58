"""Read single tensors of a safetensors checkpoint by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from io import FileIO
from pathlib import Path

import torch

from delta.scratch import Scratch
from delta.tensor_file import read_tensor
from registry.checkpoint import Checkpoint, read_checkpoint
from registry.errors import CheckpointError, UnsupportedModelError


class CheckpointTensors:
    """The tensors of one checkpoint."""

    def __init__(self, checkpoint: Checkpoint, opened: Mapping[Path, FileIO]) -> None:
        self.checkpoint = checkpoint
        self._opened = opened

    def names(self) -> list[str]:
        """In the order of the files, so that a pass over all reads each file from start to end."""
        order = {file: index for index, file in enumerate(self.checkpoint.files)}
        headers = self.checkpoint.tensors.values()
        return [header.name for header in sorted(headers, key=lambda at: (order[at.file], at.offset_bytes))]

    def __contains__(self, name: str) -> bool:
        return name in self.checkpoint.tensors

    def shape(self, name: str) -> tuple[int, ...]:
        return self.checkpoint.tensors[name].shape

    def read(self, name: str, scratch: Scratch | None = None) -> torch.Tensor:
        """One tensor, in `scratch` or else in memory of its own.

        Raises:
            CheckpointError: the file was damaged since it was opened.
        """
        header = self.checkpoint.tensors[name]
        return read_tensor(self._opened[header.file], header, scratch)

    @property
    def num_bytes(self) -> int:
        return sum(header.num_bytes for header in self.checkpoint.tensors.values())

    def states(self) -> list[tuple[str, int, int, int]]:
        """Name, size, change time and inode of each file: other ones after a file was written to or replaced."""
        found = [(file.name, file.stat()) for file in self.checkpoint.files]
        return [(name, at.st_size, at.st_mtime_ns, at.st_ino) for name, at in found]


@contextmanager
def open_checkpoint(path: Path) -> Iterator[CheckpointTensors]:
    """Open a safetensors checkpoint.

    Raises:
        UnsupportedModelError: GGUF or `.bin`, which are to be converted first.
        CheckpointError: files missing or damaged.
    """
    checkpoint = read_checkpoint(path)
    if checkpoint.format != "safetensors":
        raise UnsupportedModelError(
            f"{path} is a {checkpoint.format} checkpoint; deltas are made from safetensors. "
            f"Convert it first: python -m adapters convert {path} DIRECTORY"
        )
    with ExitStack() as stack:
        opened: dict[Path, FileIO] = {}
        for file in checkpoint.files:
            try:
                opened[file] = stack.enter_context(file.open("rb", buffering=0))
            except OSError as error:
                raise CheckpointError(f"{file} cannot be read ({error.strerror}); download it again") from error
        yield CheckpointTensors(checkpoint, opened)

"""Read single tensors of a safetensors checkpoint by name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from registry.checkpoint import Checkpoint, read_checkpoint
from registry.errors import CheckpointError, UnsupportedModelError


class CheckpointTensors:
    """The tensors of one checkpoint, mapped from its files."""

    def __init__(self, checkpoint: Checkpoint, opened: dict[Path, Any]) -> None:
        self.checkpoint = checkpoint
        self._opened = opened

    def names(self) -> list[str]:
        """In the order of the files, so that a pass over all reads each file from start to end."""
        order = {file: index for index, file in enumerate(self.checkpoint.files)}
        headers = self.checkpoint.tensors.values()
        return [header.name for header in sorted(headers, key=lambda at: (order[at.file], at.offset_bytes))]

    def read(self, name: str) -> torch.Tensor:
        """Raises CheckpointError if the file was damaged since it was opened."""
        file = self.checkpoint.tensors[name].file
        try:
            tensor: torch.Tensor = self._opened[file].get_tensor(name)
        except SafetensorError as error:
            raise CheckpointError(f"{file}: tensor {name!r} cannot be read ({error})") from error
        return tensor


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
        opened: dict[Path, Any] = {}
        for file in checkpoint.files:
            try:
                opened[file] = stack.enter_context(safe_open(file, framework="pt", device="cpu"))
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{file} cannot be read ({error}); download it again") from error
        yield CheckpointTensors(checkpoint, opened)

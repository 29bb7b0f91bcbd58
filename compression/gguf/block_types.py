"""Sizes of the GGUF tensor types that we read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from registry.errors import CheckpointError, UnsupportedModelError


@dataclass(frozen=True, slots=True)
class BlockType:
    """A tensor type: each `block_size` neighbouring weights of a row are stored as `block_bytes` bytes."""

    name: str
    block_size: int
    block_bytes: int

    def num_bytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of a tensor of `shape` (row-major, the last dimension is the row).

        Raises:
            CheckpointError: a row is not a whole number of blocks.
        """
        if shape and shape[-1] % self.block_size:
            raise CheckpointError(
                f"a {self.name} tensor of shape {list(shape)} is impossible: its rows are not a multiple of "
                f"{self.block_size} long. The file is damaged"
            )
        return math.prod(shape) // self.block_size * self.block_bytes


BLOCK_TYPES: Mapping[str, BlockType] = {
    kind.name: kind
    for kind in (
        BlockType("F32", 1, 4),
        BlockType("F16", 1, 2),
        BlockType("BF16", 1, 2),
        BlockType("Q8_0", 32, 2 + 32),
        BlockType("Q4_0", 32, 2 + 16),
        BlockType("Q4_1", 32, 2 + 2 + 16),
        BlockType("Q4_K", 256, 2 + 2 + 12 + 128),
        BlockType("Q5_K", 256, 2 + 2 + 12 + 32 + 128),
        BlockType("Q6_K", 256, 128 + 64 + 16 + 2),
    )
}


def find_block_type(name: str) -> BlockType:
    """Raises UnsupportedModelError for a tensor type that we do not read."""
    if name not in BLOCK_TYPES:
        raise UnsupportedModelError(
            f"GGUF tensor type {name} is not supported (supported: {', '.join(BLOCK_TYPES)}). "
            "Use another quantization of the model, or its safetensors release"
        )
    return BLOCK_TYPES[name]

"""Matrices of single bits as bytes: bit k % 8 of byte k // 8 of a row is its number k, the lowest first.

In NumPy, which packs, compares and counts several times as fast as torch.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from delta.codecs.codec import Parts
from delta.codecs.part_checks import check_part

_MAX_BLOCK_NUMBERS = 1 << 17


def pack_bits(bits: NDArray[np.bool_]) -> Tensor:
    """[..., K] -> [..., ceil(K / 8)] uint8, 0 beyond K"""
    return torch.from_numpy(np.packbits(bits, axis=-1, bitorder="little"))


def unpack_bits(packed: Tensor, num_bits: int) -> NDArray[np.bool_]:
    """[..., ceil(num_bits / 8)] uint8 -> [..., num_bits]"""
    return np.unpackbits(packed.numpy(), axis=-1, count=num_bits, bitorder="little").view(np.bool_)


def check_bits(parts: Parts, name: str, shape: tuple[int, int]) -> None:
    """Raises ValueError: the part is not the bits of a matrix of this shape, or has some set beyond its last column."""
    num_rows, num_columns = shape
    bits = check_part(parts, name, (torch.uint8,), (num_rows, -(-num_columns // 8)))
    if num_columns % 8 and bool((bits[:, -1] >> num_columns % 8).any()):
        raise ValueError(f"{name} has bits set beyond column {num_columns}")


def row_blocks(shape: tuple[int, ...] | torch.Size) -> Iterator[slice]:
    """Ranges of rows of a matrix, of which one fits a processor's cache as float32."""
    num_rows, num_columns = shape
    step = max(1, _MAX_BLOCK_NUMBERS // max(1, num_columns))
    for first in range(0, num_rows, step):
        yield slice(first, min(first + step, num_rows))

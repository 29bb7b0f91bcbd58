"""GGUF's simple blocks as they are: the integers of Q8_0, Q4_0 and Q4_1 with their float16 scales, not dequantized.

With d, m the block's scale and offset and q its integers, a block is a group of 32 inputs:

    Q8_0  scale d, value q          Q4_0  scale d, value q, minimum -8 d          Q4_1  scale d, value q, minimum m

-8 d is exact in float16 unless it overflows. `GroupedWeight.dequantize` then gives the numbers of `dequantize`, bit for
bit, but for the sign of zero: d (q - 8) is -0 where d is negative and q is 8, d q - 8 d is +0.

Source: docs/formats/gguf.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from compression.gguf.dequantize import split_blocks, unpack_nibbles
from compression.grouped_weight import GROUP, GroupedWeight, can_quantize
from registry.errors import CheckpointError
from registry.ggml_types import GGML_TYPES

Bytes: TypeAlias = npt.NDArray[np.uint8]


def read_grouped(
    data: memoryview | bytes | npt.NDArray[np.uint8], dtype: str, shape: tuple[int, ...]
) -> GroupedWeight | None:
    """One tensor's own scales and integers, in memory of their own.

    Args:
        data: its bytes, exactly as many as `dtype` and `shape` say.
        dtype: GGUF type name, such as "Q4_1".
        shape: row-major, the last dimension is contiguous in the file.

    Returns:
        None for what has no such form: another type, no matrix, or Q4_0 with a scale beyond 8,188.

    Raises:
        CheckpointError: a length that contradicts the shape, or scales that are infinite or NaN.
    """
    if dtype not in _READ or not can_quantize(shape):
        return None
    kind = next(kind for kind in GGML_TYPES.values() if kind.name == dtype)
    values, scales, minimums = _READ[dtype](split_blocks(data, kind, shape))
    if not bool(torch.isfinite(scales).all()):
        raise CheckpointError(
            f"a {dtype} tensor has scales that are infinite or NaN: the file is damaged; fetch it again"
        )
    if minimums is not None and not bool(torch.isfinite(minimums).all()):
        if dtype == "Q4_0":  # made here, of a scale that is all right
            return None
        raise CheckpointError(
            f"a {dtype} tensor has offsets that are infinite or NaN: the file is damaged; fetch it again"
        )
    per_group = (shape[0], shape[1] // GROUP)
    return GroupedWeight(
        values.view(shape), scales.view(per_group), None if minimums is None else minimums.view(per_group)
    )


def _read_q8_0(blocks: Bytes) -> tuple[Tensor, Tensor, Tensor | None]:
    return torch.from_numpy(blocks[:, 2:].view(np.int8).copy()), _halves(blocks[:, :2]), None


def _read_q4_0(blocks: Bytes) -> tuple[Tensor, Tensor, Tensor | None]:
    scales = _halves(blocks[:, :2])
    return _nibbles(blocks[:, 2:]), scales, -8 * scales


def _read_q4_1(blocks: Bytes) -> tuple[Tensor, Tensor, Tensor | None]:
    return _nibbles(blocks[:, 4:]), _halves(blocks[:, :2]), _halves(blocks[:, 2:4])


def _halves(column: Bytes) -> Tensor:
    """[n, 2] bytes -> [n, 1] float16"""
    return torch.from_numpy(np.ascontiguousarray(column).view("<f2").astype(np.float16))


def _nibbles(packed: Bytes) -> Tensor:
    """[n, 16] bytes -> [n, 32] int8"""
    values = np.empty((len(packed), 2, 16), np.int8)
    unpack_nibbles(packed, values)
    return torch.from_numpy(values.reshape(-1, GROUP))


_READ: Mapping[str, Callable[[Bytes], tuple[Tensor, Tensor, Tensor | None]]] = {
    "Q8_0": _read_q8_0,
    "Q4_0": _read_q4_0,
    "Q4_1": _read_q4_1,
}
GROUPED_TYPES = frozenset(_READ)

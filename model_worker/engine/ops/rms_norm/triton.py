"""Launches the kernels for GPUs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from model_worker.engine.ops.rms_norm.triton_kernels import add_rms_norm_kernel, rms_norm_kernel

if TYPE_CHECKING:
    from model_worker.engine.ops.rms_norm.functional import RowWeights

_TILE = 4096  # numbers of a program, where heads are smaller
_NUMBERS_PER_WARP = 1024  # 32 a thread: four loads of 16 bytes under way
_MAX_WARPS = 16


def rms_norm(
    x: Tensor, weight: Tensor, epsilon: float, *, num_heads: int, out: Tensor | None, row_weights: RowWeights | None
) -> Tensor:
    """See functional.py."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    assert out.shape == x.shape
    assert out.dtype == x.dtype
    assert out.stride(1) == 1
    _launch(x, out, weight, epsilon, num_heads, 1.0, row_weights, accumulate=False)
    return out


def rms_norm_add(
    x: Tensor, residual: Tensor, weight: Tensor, epsilon: float, *, multiplier: float, row_weights: RowWeights | None
) -> None:
    """See functional.py."""
    assert residual.stride(1) == 1
    _launch(x, residual, weight, epsilon, 1, multiplier, row_weights, accumulate=True)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, epsilon: float, *, multiplier: float, row_weights: RowWeights | None
) -> Tensor:
    """See functional.py."""
    num_rows, size = x.shape
    assert residual.stride(1) == 1
    out = torch.empty(num_rows, size, dtype=x.dtype, device=x.device)
    if num_rows:
        block = _power_of_two(size)
        with torch.cuda.device(x.get_device()):
            add_rms_norm_kernel[(num_rows,)](
                x,
                residual,
                out,
                weight,
                _addresses(row_weights),
                x.stride(0),
                residual.stride(0),
                size,
                epsilon,
                multiplier,
                BLOCK_SIZE=block,
                num_warps=_num_warps(block),
            )
    return out


def _launch(
    x: Tensor,
    out: Tensor,
    weight: Tensor,
    epsilon: float,
    num_heads: int,
    multiplier: float,
    row_weights: RowWeights | None,
    *,
    accumulate: bool,
) -> None:
    num_rows, size = len(x), x.shape[1] // num_heads
    block_size = _power_of_two(size)
    block_heads = min(_power_of_two(num_heads), max(1, _TILE // block_size))
    if num_rows:
        with torch.cuda.device(x.get_device()):
            rms_norm_kernel[(num_rows, -(-num_heads // block_heads))](
                x,
                out,
                weight,
                _addresses(row_weights),
                x.stride(0),
                out.stride(0),
                num_heads,
                size,
                size if len(weight) == x.shape[1] else 0,
                epsilon,
                multiplier,
                ACCUMULATE=accumulate,
                BLOCK_HEADS=block_heads,
                BLOCK_SIZE=block_size,
                num_warps=_num_warps(block_heads * block_size),
            )


def _addresses(row_weights: RowWeights | None) -> Tensor | None:
    if row_weights is None:
        return None
    assert row_weights.addresses is not None
    return row_weights.addresses


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


def _num_warps(numbers: int) -> int:
    return min(max(numbers // _NUMBERS_PER_WARP, 1), _MAX_WARPS)

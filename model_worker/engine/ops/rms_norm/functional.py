"""Root mean square normalization of tensors in a model's dtype, as GPUs compute it.

    n = x / sqrt(mean(x^2) + epsilon)            float32, over each head of x: [T, heads * size]
    y = round(round(n) * w)                      w in x's dtype      llama and most families
    y = round(n * w)                             w in float32        gemma (w is 1 + the stored weight), olmo

    rms_norm(x)                                  out = y
    add_rms_norm(x, residual)                    residual = round(residual + round(m * x)),  out = y of the residual
    rms_norm_add(x, residual)                    residual = round(residual + round(m * y))

        x, out, residual  [T, heads * size] bfloat16, float16 or float32, all of one dtype, rows contiguous
        w                 [size], the same for all heads, or [heads * size]
        round             to the dtype of x; m is a number, 1 in most families

These are the roundings of transformers' modules, each family's own. `rms_norm` may write to x itself: the heads of q
and k in a fused qkv buffer are normalized in place, in one launch where both have one size (w is then [heads * size]).

Rows may have another weight: norms of variants (`RowWeights`).

Source: Zhang and Sennrich, arXiv 1910.07467.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from model_worker.engine.ops.rms_norm.reference import rms_norm_reference

__all__ = ["RowWeights", "add_rms_norm", "rms_norm", "rms_norm_add"]


@dataclass(frozen=True, slots=True, eq=False)
class RowWeights:
    """Weights that some rows of a step have in place of a norm's own.

    Attributes:
        segments: (start, end, weight) of rows, without overlap; the weight has the shape and dtype of the norm's own.
        addresses: [T or more] int64 on the device, of each row's weight, 0: the norm's own; None on CPUs. They hold as
            long as the weights live. A captured graph reads them anew in each replay.
    """

    segments: tuple[tuple[int, int, Tensor], ...]
    addresses: Tensor | None = None


def rms_norm(
    x: Tensor,
    weight: Tensor,
    epsilon: float,
    *,
    num_heads: int = 1,
    out: Tensor | None = None,
    row_weights: RowWeights | None = None,
) -> Tensor:
    """Each head of each row, by itself.

    Args:
        out: of x's shape and dtype; may be x; None: a new tensor.

    Returns:
        `out`.
    """
    _check(x, weight, num_heads)
    if x.device.type == "cuda":
        from model_worker.engine.ops.rms_norm import triton  # not installed where there is no GPU

        return triton.rms_norm(x, weight, epsilon, num_heads=num_heads, out=out, row_weights=row_weights)
    y = rms_norm_reference(x, weight, epsilon, num_heads, _segments(row_weights))
    return y if out is None else out.copy_(y)


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    epsilon: float,
    *,
    multiplier: float = 1.0,
    row_weights: RowWeights | None = None,
) -> Tensor:
    """Adds x to the residual, in place, and normalizes that. -> [T, size], a new tensor

    Args:
        residual: [T, size] of x's dtype; changed.
        multiplier: of x (granite's residual_multiplier).
    """
    _check(x, weight, 1)
    assert residual.shape == x.shape
    assert residual.dtype == x.dtype
    if x.device.type == "cuda":
        from model_worker.engine.ops.rms_norm import triton  # not installed where there is no GPU

        return triton.add_rms_norm(x, residual, weight, epsilon, multiplier=multiplier, row_weights=row_weights)
    residual += x * multiplier
    return rms_norm_reference(residual, weight, epsilon, 1, _segments(row_weights))


def rms_norm_add(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    epsilon: float,
    *,
    multiplier: float = 1.0,
    row_weights: RowWeights | None = None,
) -> None:
    """Normalizes x and adds that to the residual, in place: norms of outputs (gemma2, gemma3, olmo2).

    Args:
        residual: [T, size] of x's dtype; changed.
        multiplier: of the normalized x.
    """
    _check(x, weight, 1)
    assert residual.shape == x.shape
    assert residual.dtype == x.dtype
    if x.device.type == "cuda":
        from model_worker.engine.ops.rms_norm import triton  # not installed where there is no GPU

        triton.rms_norm_add(x, residual, weight, epsilon, multiplier=multiplier, row_weights=row_weights)
    else:
        residual += rms_norm_reference(x, weight, epsilon, 1, _segments(row_weights)) * multiplier


def _segments(row_weights: RowWeights | None) -> tuple[tuple[int, int, Tensor], ...]:
    return () if row_weights is None else row_weights.segments


def _check(x: Tensor, weight: Tensor, num_heads: int) -> None:
    assert weight.dtype in (x.dtype, torch.float32)
    assert weight.is_contiguous()
    assert x.ndim == 2
    assert x.stride(1) == 1
    assert x.shape[1] % num_heads == 0
    assert len(weight) in (x.shape[1], x.shape[1] // num_heads)

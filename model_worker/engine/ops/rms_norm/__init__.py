"""Root mean square normalization.

    y[t, h] = alpha * x[t, h] / sqrt(mean(x[t, h]^2) + epsilon) * weight[h]          out = y,  or  out += y

    x, out   [T, heads * size] float32, rows contiguous; out may be x
    weight   [size], the same for all heads, or [heads * size] where heads have their own; a variant may have another

Norms over a whole row have one head of its size. A norm whose weight is stored as w with 1 + w meant (gemma) is given
1 + w. Source: Zhang and Sennrich, arXiv 1910.07467.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from model_worker.engine.ops.cpu.program import Step, address, row_stride

__all__ = ["RMSNorm"]


class _RMSNormArgs(ctypes.Structure):
    _fields_ = (
        ("x", ctypes.c_void_p),
        ("x_stride", ctypes.c_int64),
        ("out", ctypes.c_void_p),
        ("out_stride", ctypes.c_int64),
        ("weight", ctypes.c_void_p),
        ("weight_stride", ctypes.c_int64),
        ("num_heads", ctypes.c_int64),
        ("size", ctypes.c_int64),
        ("epsilon", ctypes.c_float),
        ("accumulate", ctypes.c_int64),
        ("alpha", ctypes.c_float),
        ("index", ctypes.c_int64),
    )


@dataclass(frozen=True, slots=True, eq=False)
class RMSNorm:
    """See the package's docstring. index: of this norm in a variant's table; None: no row has a variant."""

    name: str
    x: Tensor
    weight: Tensor
    out: Tensor
    epsilon: float
    num_heads: int = 1
    accumulate: bool = False
    alpha: float = 1.0
    index: int | None = None
    kernel: str = "rootgraft_rms_norm"

    def __post_init__(self) -> None:
        assert self.weight.dtype == torch.float32
        assert self.x.shape == self.out.shape
        assert self.x.shape[1] % self.num_heads == 0
        assert len(self.weight) in (self.x.shape[1], self._size)

    @property
    def _size(self) -> int:
        return self.x.shape[1] // self.num_heads

    def arguments(self) -> ctypes.Structure:
        return _RMSNormArgs(
            address(self.x),
            row_stride(self.x),
            address(self.out),
            row_stride(self.out),
            address(self.weight),
            self._size if len(self.weight) == self.x.shape[1] else 0,
            self.num_heads,
            self._size,
            self.epsilon,
            self.accumulate,
            self.alpha,
            -1 if self.index is None else self.index,
        )

    def reference(self, step: Step) -> None:
        x = self.x[: step.num_rows].view(step.num_rows, self.num_heads, self._size)
        factor = torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + self.epsilon)
        weights = self.weight.view(1, -1, self._size).repeat(step.num_rows, 1, 1)
        if self.index is not None and step.variants is not None:
            for start, end, variant in step.variants.segments:
                if self.index in variant.norms:
                    weights[start:end] = variant.norms[self.index].view(-1, self._size)
        y = (x * factor * weights).flatten(1) * self.alpha
        if self.accumulate:
            self.out[: step.num_rows] += y
        else:
            self.out[: step.num_rows] = y

    def bytes_moved(self, step: Step) -> int:
        return 4 * step.num_rows * self.x.shape[1] * (3 if self.accumulate else 2)

    def flops(self, step: Step) -> int:
        return 0

"""Rows of an embedding.

    out[t] = multiplier * W[input_ids[t]]          W [vocab, size] packed as for linear layers; out [T, size] float32

A token that W has no row for is one of a variant, which puts its own row there (ops/lora); here it gets 0.

The packing is that of a head's weight, so that a model whose embedding is also its head keeps it once. A row is then
not contiguous: reading one costs some microseconds, against milliseconds for the rest of a token.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

from torch import Tensor

from model_worker.engine.ops.cpu.program import Step, address, row_stride
from model_worker.engine.ops.linear.packed_weight import PackedWeight

__all__ = ["Embedding"]


class _EmbeddingArgs(ctypes.Structure):
    _fields_ = (
        ("weight", ctypes.c_void_p),
        ("format", ctypes.c_int64),
        ("num_rows", ctypes.c_int64),
        ("size", ctypes.c_int64),
        ("out", ctypes.c_void_p),
        ("out_stride", ctypes.c_int64),
        ("multiplier", ctypes.c_float),
    )


@dataclass(frozen=True, slots=True, eq=False)
class Embedding:
    """See the package's docstring."""

    name: str
    weight: PackedWeight
    out: Tensor
    multiplier: float = 1.0
    kernel: str = "rootgraft_embedding"

    def __post_init__(self) -> None:
        assert self.out.shape[1] == self.weight.num_inputs

    def arguments(self) -> ctypes.Structure:
        return _EmbeddingArgs(
            address(self.weight.data),
            self.weight.format,
            self.weight.num_outputs,
            self.weight.num_inputs,
            address(self.out),
            row_stride(self.out),
            self.multiplier,
        )

    def reference(self, step: Step) -> None:
        known = step.input_ids < self.weight.num_outputs
        out = self.out[: step.num_rows]
        out[known] = self.weight.unpack()[step.input_ids[known]] * self.multiplier
        out[~known] = 0

    def bytes_moved(self, step: Step) -> int:
        per_row = self.weight.num_bytes // self.weight.num_outputs
        return step.num_rows * (per_row + 4 * self.weight.num_inputs)

    def flops(self, step: Step) -> int:
        return 0

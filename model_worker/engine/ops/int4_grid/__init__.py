"""Rounding weights to 4 bits on the CPU kernels, bit for bit as `compression.int4.quantize_int4` does.

    for each group of 32 weights w:  the grid (scale, minimum), of some candidates, with the least squared error
                                     values = clamp(round((w - minimum) / scale), 0, 15)

That is stated in full, with its source, in compression/int4.py. All products and sums are rounded and ordered as torch
rounds and orders them, so that a checkpoint gives the same model on every machine.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from compression.grouped_weight import GROUP, GroupedWeight, split_groups
from compression.int4 import quantize_int4
from model_worker.engine.ops.cpu.program import Program, Step, Team, address
from registry.errors import InternalError

__all__ = ["FitInt4Grids", "quantize_int4_natively"]


class _FitArgs(ctypes.Structure):
    _fields_ = (
        ("weights", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("minimums", ctypes.c_void_p),
        ("refused", ctypes.c_void_p),
    )


@dataclass(frozen=True, slots=True, eq=False)
class FitInt4Grids:
    """Rows of a step are groups.

    Attributes:
        weights: [G, 32] float32, contiguous.
        values: [G, 32] int8, 0..15.
        scales, minimums: [G] float16.
        refused: [1] int32; becomes 1 where `quantize_int4` raises an error, and the rest means nothing then.
    """

    name: str
    weights: Tensor
    values: Tensor
    scales: Tensor
    minimums: Tensor
    refused: Tensor
    kernel: str = "rootgraft_fit_int4_grids"

    @classmethod
    def allocate(cls, name: str, weights: Tensor) -> FitInt4Grids:
        """With buffers of its own for the result."""
        num_groups = len(weights)
        return cls(
            name,
            weights,
            torch.empty(num_groups, GROUP, dtype=torch.int8),
            torch.empty(num_groups, dtype=torch.float16),
            torch.empty(num_groups, dtype=torch.float16),
            torch.zeros(1, dtype=torch.int32),
        )

    def __post_init__(self) -> None:
        assert self.weights.dtype == torch.float32
        assert self.weights.is_contiguous()

    def arguments(self) -> ctypes.Structure:
        return _FitArgs(*map(address, (self.weights, self.values, self.scales, self.minimums, self.refused)))

    def reference(self, step: Step) -> None:
        part = slice(step.num_rows)
        rounded = quantize_int4(self.weights[part])
        assert rounded.minimums is not None
        self.values[part] = rounded.values
        self.scales[part], self.minimums[part] = rounded.scales.flatten(), rounded.minimums.flatten()

    def bytes_moved(self, step: Step) -> int:
        return step.num_rows * (4 * GROUP + GROUP + 4)

    def flops(self, step: Step) -> int:
        return 0


def quantize_int4_natively(weight: Tensor, team: Team) -> GroupedWeight:
    """See `compression.int4.quantize_int4`: the same result and the same errors."""
    groups = split_groups(weight).float().contiguous()
    fit = FitInt4Grids.allocate("int4", groups)
    Program(team, [fit]).run(Step.of_rows(len(groups)))
    if fit.refused.item():
        quantize_int4(weight)  # says why
        raise InternalError("The CPU kernels refuse a weight that can be rounded to 4 bits; use --quantization int8.")
    per_group = (len(weight), weight.shape[1] // GROUP)
    return GroupedWeight(fit.values.view(len(weight), -1), fit.scales.view(per_group), fit.minimums.view(per_group))

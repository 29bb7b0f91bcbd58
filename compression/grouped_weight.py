"""Weights of 8 or 4 bits whose scales belong to groups of 32 inputs, as int8, int4 and GGUF's simple blocks have them.

w[n, k] = scale[n, k // 32] * value[n, k] + minimum[n, k // 32]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from registry.errors import CheckpointError, UnsupportedModelError

GROUP = 32


@dataclass(frozen=True, slots=True, eq=False)
class GroupedWeight:
    """A quantized weight [N, K]; K is a multiple of 32.

    Attributes:
        values: [N, K] int8; of 8 bits -128..127, of 4 bits 0..15.
        scales: [N, K / 32] float16.
        minimums: [N, K / 32] float16, for 4 bits; None for 8 bits: no minimum.
    """

    values: Tensor
    scales: Tensor
    minimums: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in (self.values, self.scales, self.minimums) if tensor is not None)

    def map_rows(self, function: Callable[[Tensor], Tensor]) -> GroupedWeight:
        """With rows selected or put into another order: `function` [N, ...] -> [M, ...] looks at whole rows only."""
        return GroupedWeight(
            function(self.values),
            function(self.scales),
            None if self.minimums is None else function(self.minimums),
        )

    def dequantize(self) -> Tensor:
        """-> [N, K] float32"""
        groups = self.values.view(len(self.values), -1, GROUP).float() * self.scales.float()[..., None]
        if self.minimums is not None:
            groups = groups + self.minimums.float()[..., None]
        return groups.flatten(1)


def can_quantize(shape: Sequence[int]) -> bool:
    """Whether a tensor of this shape can be a GroupedWeight: a matrix whose rows are whole groups."""
    return len(shape) == 2 and shape[1] > 0 and shape[1] % GROUP == 0


def split_groups(weight: Tensor) -> Tensor:
    """[N, K] floating point -> [N * K / 32, 32], for what quantizes it.

    Raises:
        UnsupportedModelError: rows that are not whole groups.
    """
    if not can_quantize(weight.shape):
        raise UnsupportedModelError(
            f"A weight of shape {list(weight.shape)} cannot be quantized: only matrices whose rows are a multiple of "
            f"{GROUP} long can."
        )
    return weight.reshape(-1, GROUP)


def groups_per_chunk(device: torch.device) -> int:
    """So many groups are quantized at a time: temporary arrays stay in a CPU's cache, and are work for a whole GPU."""
    return 1 << 11 if device.type == "cpu" else 1 << 18


def check_finite(extremes: Tensor) -> None:
    """Raises CheckpointError where the extremes of some groups say that an infinite value or NaN is among them."""
    if not bool(torch.isfinite(extremes).all()):
        raise CheckpointError(
            "A weight holds infinite values or NaN and cannot be quantized; download the model again."
        )


def check_range(largest: float) -> None:
    """Raises UnsupportedModelError where the largest scale or minimum is none that float16 can hold."""
    if largest >= 65520:  # what would round to infinity
        raise UnsupportedModelError(
            f"A weight is too large to be quantized: float16 cannot hold its scale {largest:.3g}. "
            "Serve the model with --quantization none."
        )

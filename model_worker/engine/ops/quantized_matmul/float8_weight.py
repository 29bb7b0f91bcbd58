"""Weights and rows of float8_e4m3fn numbers, which have one scale for each row of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

FLOAT8 = torch.float8_e4m3fn
_LARGEST = 448.0
SMALLEST_SCALE = 2.0**-100  # of rows of zeros


@dataclass(frozen=True, slots=True, eq=False)
class Float8Weight:
    """A weight [N, K].

    Attributes:
        values: [N, K] float8_e4m3fn.
        scales: [N, 1] float32; w[n, k] = scales[n] * values[n, k].
    """

    values: Tensor
    scales: Tensor

    @property
    def num_inputs(self) -> int:
        return self.values.shape[1]

    @property
    def num_outputs(self) -> int:
        return len(self.values)

    @property
    def num_bytes(self) -> int:
        return self.values.nbytes + self.scales.nbytes

    def dequantize(self) -> Tensor:
        """-> [N, K] float32"""
        return self.values.float() * self.scales


def quantize_float8(matrix: Tensor) -> Float8Weight:
    """[N, K] finite -> each row as the nearest numbers times max|row| / 448."""
    wide = matrix.float()
    scales = wide.abs().amax(dim=1, keepdim=True).div_(_LARGEST).clamp_(min=SMALLEST_SCALE)
    return Float8Weight((wide / scales).clamp_(-_LARGEST, _LARGEST).to(FLOAT8), scales)

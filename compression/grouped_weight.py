"""Weights of 8 or 4 bits whose scales belong to groups of 32 inputs, as int8, int4 and GGUF's simple blocks have them.

w[n, k] = scale[n, k // 32] * value[n, k] + minimum[n, k // 32]
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

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

    def dequantize(self) -> Tensor:
        """-> [N, K] float32"""
        groups = self.values.view(len(self.values), -1, GROUP).float() * self.scales.float()[..., None]
        if self.minimums is not None:
            groups = groups + self.minimums.float()[..., None]
        return groups.flatten(1)

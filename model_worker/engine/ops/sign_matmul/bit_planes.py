"""Signs in the order in which kernels for GPUs read them.

    words    [N, K / 1024 rounded up, 32] int32      bit b (0 to 15) of the half h (0, 1) of word i of block k of a row
                                                     is 1 where the sign of input k * 1024 + b * 64 + i * 2 + h is +1;
                                                     0 beyond K

So a block's 32 words, shifted by the same number of bits, hold the signs of 64 inputs beside each other, two in a word:
where pairs of 16-bit numbers have theirs.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

BLOCK = 1024
"""Inputs."""

_HALF_BITS = 16
_BYTES = 8  # of 64 inputs


def to_bit_planes(bits: Tensor) -> Tensor:
    """[N, ceil(K / 8)] uint8, whose byte k // 8 has input k at bit k % 8 -> words, on the same device"""
    padded = functional.pad(bits, (0, -bits.shape[1] % (BLOCK // 8)))
    rows = padded.contiguous().view(len(bits), -1, _HALF_BITS, _BYTES)
    places = torch.arange(8, device=bits.device, dtype=torch.uint8)
    halves = torch.zeros(*rows.shape[:2], BLOCK // _HALF_BITS, dtype=torch.int16, device=bits.device)
    for bit in range(_HALF_BITS):
        ones = (rows[:, :, bit, :, None] >> places) & 1  # [N, blocks, 8, 8]
        halves |= ones.flatten(2).to(torch.int16) << bit
    return halves.view(torch.int32)

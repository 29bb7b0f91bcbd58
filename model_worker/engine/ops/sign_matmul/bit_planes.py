"""Signs in the order in which kernels for GPUs read them.

    words    [N, K / 1024 rounded up, 32] int32      bit b of word i of block k of a row is 1 where the sign of input
                                                     k * 1024 + b * 32 + i is +1; 0 beyond K

The threads that have the words of a block beside each other find the inputs of one bit of them beside each other.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

BLOCK = 1024
"""Inputs."""

_WORDS = 32  # of a block, and bits of a word
_HALVES = ((16, 0x0000FFFF), (8, 0x00FF00FF), (4, 0x0F0F0F0F), (2, 0x33333333), (1, 0x55555555))


def to_bit_planes(bits: Tensor) -> Tensor:
    """[N, ceil(K / 8)] uint8, whose byte k // 8 has input k at bit k % 8 -> words

    There, bit i of word b of a block is input b * 32 + i: each block is a matrix of 32 x 32 bits, to be transposed.

    Source: Warren, Hacker's Delight, section 7-3.
    """
    padded = functional.pad(bits, (0, -bits.shape[1] % (BLOCK // 8))).contiguous()
    words = padded.view(torch.int32).view(len(bits), -1, _WORDS).clone()
    for half, mask in _HALVES:
        pairs = words.view(*words.shape[:2], _WORDS // (2 * half), 2, half)
        low, high = pairs[..., 0, :], pairs[..., 1, :]
        exchanged = ((low >> half) ^ high) & mask
        low ^= exchanged << half
        high ^= exchanged
    return words

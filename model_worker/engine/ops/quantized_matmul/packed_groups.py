"""Weights whose scales belong to groups of 32 inputs, in the order in which GPUs read them.

    words    [N, K / 32, B] int32      bits [j B, (j + 1) B) of word i of group g of a row hold the number of input
                                       g * 32 + j * B + i        of B = 4 or 8 bits; j < 32 / B

A group of 4 bits is thus four words, which one thread reads at once, beside the threads that read the groups before
and after it. One shift and one mask of four words give four numbers whose inputs lie side by side, and which have one
scale. Numbers of 8 bits are stored plus 128.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compression.grouped_weight import GROUP, GroupedWeight

_WORD_BITS = 32
_ZERO = 128  # of 8 bits


@dataclass(frozen=True, slots=True, eq=False)
class PackedGroups:
    """A weight [N, K].

    Attributes:
        words: [N, K / 32, B] int32, as the module's docstring says.
        grids: float16; of 8 bits the scales [N, K / 32], of 4 bits the scales and minimums [N, K / 32, 2].
    """

    words: Tensor
    grids: Tensor

    @property
    def bits(self) -> int:
        """B"""
        return self.words.shape[2]

    @property
    def num_inputs(self) -> int:
        return self.words.shape[1] * GROUP

    @property
    def num_outputs(self) -> int:
        return len(self.words)

    @property
    def num_bytes(self) -> int:
        return self.words.nbytes + self.grids.nbytes

    def dequantize(self) -> Tensor:
        """-> [N, K] float32"""
        return unpack_groups(self).dequantize()


def pack_groups(weight: GroupedWeight, device: torch.device | None = None) -> PackedGroups:
    """The same weight for a device; None: where it is. `unpack_groups` gives it back bit for bit."""
    device = weight.values.device if device is None else device
    bits = 8 if weight.minimums is None else 4
    num_outputs, num_inputs = weight.shape
    numbers = weight.values.to(device).int() + (_ZERO if weight.minimums is None else 0)
    fields = numbers.view(num_outputs, num_inputs // GROUP, -1, bits)  # [N, groups, 32 / B, B]
    words = torch.zeros_like(fields[:, :, 0])
    for place in range(fields.shape[2]):
        words |= fields[:, :, place] << place * bits
    grids = weight.scales if weight.minimums is None else torch.stack((weight.scales, weight.minimums), dim=2)
    return PackedGroups(words, grids.to(device).contiguous())


def unpack_groups(packed: PackedGroups) -> GroupedWeight:
    """What it was packed from."""
    bits, device = packed.bits, packed.words.device
    shifts = torch.arange(0, _WORD_BITS, bits, dtype=torch.int32, device=device)[:, None]
    numbers = ((packed.words[:, :, None] >> shifts) & ((1 << bits) - 1)).view(packed.num_outputs, -1)
    if bits == 8:
        return GroupedWeight((numbers - _ZERO).to(torch.int8), packed.grids)
    return GroupedWeight(numbers.to(torch.int8), packed.grids[..., 0].contiguous(), packed.grids[..., 1].contiguous())

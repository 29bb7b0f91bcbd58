"""Weights whose scales belong to groups of 32 inputs, in the order in which GPUs read them.

    words    [N, W] int32       word i of span s of a row holds, in its bits [j B, (j + 1) B), the number of input
                                s * 32 P + j * 32 + i        B = 4 or 8 bits, P = 32 / B planes, 32 words a span

A span is thus P groups: group j is what bits [j B, (j + 1) B) of its words hold, so that one shift and one mask give a
whole group in the order of its inputs, and a row's words, which lie one after the other, are read whole. Numbers of
8 bits are stored plus 128. Rows are filled up to a whole span with groups whose scale and minimum are 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from compression.grouped_weight import GROUP, GroupedWeight

_WORD_BITS = 32
_ZERO = 128  # of 8 bits


@dataclass(frozen=True, slots=True, eq=False)
class PackedGroups:
    """A weight [N, K].

    Attributes:
        words: [N, W] int32, as the module's docstring says.
        grids: float16; of 8 bits the scales [N, G], of 4 bits the scales and minimums [N, G, 2]; G is W / 32 * P.
        num_inputs: K.
        bits: B.
    """

    words: Tensor
    grids: Tensor
    num_inputs: int
    bits: int

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
    planes = _WORD_BITS // bits
    missing = -(num_inputs // GROUP) % planes
    numbers = weight.values.to(device).int() + (_ZERO if weight.minimums is None else 0)
    spans = F.pad(numbers, (0, missing * GROUP)).view(num_outputs, -1, planes, GROUP)
    words = torch.zeros(num_outputs, spans.shape[1], GROUP, dtype=torch.int32, device=device)
    for plane in range(planes):
        words |= spans[:, :, plane] << plane * bits
    grids = weight.scales if weight.minimums is None else torch.stack((weight.scales, weight.minimums), dim=2)
    padding = (0, missing) if weight.minimums is None else (0, 0, 0, missing)
    return PackedGroups(words.flatten(1), F.pad(grids.to(device), padding).contiguous(), num_inputs, bits)


def unpack_groups(packed: PackedGroups) -> GroupedWeight:
    """What it was packed from."""
    planes = _WORD_BITS // packed.bits
    words = packed.words.view(packed.num_outputs, -1, 1, GROUP)
    shifts = torch.arange(planes, dtype=torch.int32, device=words.device)[:, None] * packed.bits
    numbers = ((words >> shifts) & ((1 << packed.bits) - 1)).view(packed.num_outputs, -1)[:, : packed.num_inputs]
    grids = packed.grids[:, : packed.num_inputs // GROUP]
    if packed.bits == 8:
        return GroupedWeight((numbers - _ZERO).to(torch.int8), grids.contiguous())
    return GroupedWeight(numbers.to(torch.int8), grids[..., 0].contiguous(), grids[..., 1].contiguous())

"""Weights [N, K] in the order in which the CPU kernels read them: panels of 32 outputs.

    float32, bfloat16, float16      [panel][k][32]                                   values

    int8                            [panel][group]  { scale[32], values[8][32][4] }   w = scale * (value - 128)
    int4                            [panel][group]  { scale[32], minimum[32], values[4][32][4] }
                                                                                      w = scale * value + minimum

A group is 32 consecutive inputs; scales and minimums are float16. values[i][n][j] of int8 is input 4 i + j of output
n; of int4 the low half of a byte is input 4 i + j, the high half input 16 + 4 i + j. Outputs are padded with zeros to
whole panels; the inputs of quantized weights are whole groups. These are the blocks of GGUF's Q8_0 and Q4_1
(docs/formats/gguf.md) in another order, so weights in these formats are served bit for bit as the file has them.

A gated pair (gate and up projection of an MLP) is one weight whose panels hold 16 gates, then their 16 ups.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from compression.grouped_weight import GROUP, GroupedWeight

PANEL = 32


class WeightFormat(IntEnum):
    """Numbers as in packed_weight.h."""

    FLOAT32 = 0
    BFLOAT16 = 1
    FLOAT16 = 2
    INT8 = 3
    INT4 = 4

    @property
    def is_quantized(self) -> bool:
        return self in (WeightFormat.INT8, WeightFormat.INT4)


_DENSE = {
    torch.float32: WeightFormat.FLOAT32,
    torch.bfloat16: WeightFormat.BFLOAT16,
    torch.float16: WeightFormat.FLOAT16,
}


@dataclass(frozen=True, slots=True, eq=False)
class PackedWeight:
    """A weight as the kernels read it.

    Attributes:
        data: the bytes, uint8.
        num_outputs, num_inputs: N and K, without padding.
    """

    data: Tensor
    format: WeightFormat
    num_outputs: int
    num_inputs: int

    @property
    def num_bytes(self) -> int:
        return self.data.numel()

    def unpack(self) -> Tensor:
        """The values that the kernels compute with. -> [N, K] float32, in the order of the outputs as packed"""
        if not self.format.is_quantized:
            dtype = next(dtype for dtype, known in _DENSE.items() if known is self.format)
            panels = self.data.view(dtype).view(-1, self.num_inputs, PANEL)
            return panels.transpose(1, 2).reshape(-1, self.num_inputs)[: self.num_outputs].float()
        num_groups = self.num_inputs // GROUP
        groups = self.data.view(-1, num_groups, self.data.numel() // num_groups // self._num_panels)
        scales = groups[..., :64].contiguous().view(torch.float16).float()  # [panels, groups, 32]
        if self.format is WeightFormat.INT8:
            values = groups[..., 64:].reshape(-1, num_groups, 8, PANEL, 4).permute(0, 3, 1, 2, 4)
            wide = (values.reshape(-1, PANEL, num_groups, GROUP).float() - 128.0) * scales.transpose(1, 2)[..., None]
        else:
            minimums = groups[..., 64:128].contiguous().view(torch.float16).float()
            both = groups[..., 128:].reshape(-1, num_groups, 4, PANEL, 4).permute(0, 3, 1, 2, 4)
            both = both.reshape(-1, PANEL, num_groups, GROUP // 2)
            values = torch.cat([both & 0xF, both >> 4], dim=-1)
            wide = values.float() * scales.transpose(1, 2)[..., None] + minimums.transpose(1, 2)[..., None]
        return wide.reshape(-1, num_groups * GROUP)[: self.num_outputs]

    @property
    def _num_panels(self) -> int:
        return -(-self.num_outputs // PANEL)


def pack(weight: Tensor | GroupedWeight) -> PackedWeight:
    """Put a weight [N, K] into the kernels' order."""
    if isinstance(weight, GroupedWeight):
        return _pack_groups(weight)
    num_outputs, num_inputs = weight.shape
    panels = _pad_rows(weight).view(-1, PANEL, num_inputs).transpose(1, 2).contiguous()
    return PackedWeight(panels.view(torch.uint8).flatten(), _DENSE[weight.dtype], num_outputs, num_inputs)


def interleave_gated(gate: Tensor, up: Tensor) -> Tensor:
    """Rows of a gate and an up projection [I, ...] in the order of a gated weight: 16 gates, their 16 ups, and so on.

    Returns:
        [2 * (I padded to a multiple of 16), ...]
    """
    half = PANEL // 2
    padded = [torch.cat([rows, rows.new_zeros(-len(rows) % half, *rows.shape[1:])]) for rows in (gate, up)]
    return torch.stack([rows.view(-1, half, *rows.shape[1:]) for rows in padded], dim=1).flatten(0, 2)


def packed_order(num_outputs: int, *, gated: bool) -> Tensor:
    """Which output of a layer each packed output is; -1: padding. -> [N padded] int64"""
    numbers = torch.arange(1, num_outputs + 1)  # padding becomes 0
    if gated:
        return interleave_gated(*numbers.chunk(2)) - 1
    return torch.nn.functional.pad(numbers, (0, -num_outputs % PANEL)) - 1


def separate_gated(rows: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The gate and the up projection [size, ...] of rows in the order of a gated weight."""
    half = PANEL // 2
    pairs = rows.view(-1, 2, half, *rows.shape[1:])
    return pairs[:, 0].flatten(0, 1)[:size], pairs[:, 1].flatten(0, 1)[:size]


def _pack_groups(weight: GroupedWeight) -> PackedWeight:
    num_outputs, num_inputs = weight.shape
    assert num_inputs % GROUP == 0
    num_groups = num_inputs // GROUP
    values = _pad_rows(weight.values).view(torch.uint8)
    if weight.minimums is None:
        format, lead = WeightFormat.INT8, _half_bytes(weight.scales)
        quads = values.view(-1, PANEL, num_groups, 8, 4)
    else:
        format, lead = WeightFormat.INT4, torch.cat([_half_bytes(weight.scales), _half_bytes(weight.minimums)], dim=-1)
        halves = values.view(-1, PANEL, num_groups, 2, 4, 4)
        quads = halves[:, :, :, 0] | halves[:, :, :, 1] << 4
    quads = quads.permute(0, 2, 3, 1, 4)
    # Written in place: the values of a large embedding should not be in memory once more for each step of this.
    groups = torch.empty(*lead.shape[:2], lead.shape[2] + quads.shape[2:].numel(), dtype=torch.uint8)
    groups[..., : lead.shape[2]] = lead
    packed = groups[..., lead.shape[2] :]
    packed.view(quads.shape).copy_(quads)
    if format is WeightFormat.INT8:
        packed ^= 128  # adds 128 to signed bytes
    return PackedWeight(groups.flatten(), format, num_outputs, num_inputs)


def _half_bytes(per_group: Tensor) -> Tensor:
    """[N, groups] float16 -> [panels, groups, 64] uint8"""
    return _pad_rows(per_group).view(-1, PANEL, per_group.shape[1]).transpose(1, 2).contiguous().view(torch.uint8)


def _pad_rows(matrix: Tensor) -> Tensor:
    missing = -len(matrix) % PANEL
    return (torch.nn.functional.pad(matrix, (0, 0, 0, missing)) if missing else matrix).contiguous()

"""Sign planes of a fused layer's parts, put into the layout of its packed weight."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from delta.variant_terms import SignPlane
from model_worker.engine.ops.cpu.step_variants import UNIT
from model_worker.engine.ops.linear.packed_weight import packed_order
from model_worker.engine.ops.sign_planes.packed_signs import WORD, PackedSigns


class SignPart(NamedTuple):
    """One part of a fused layer: its outputs, and its planes, if it has any."""

    num_outputs: int
    planes: tuple[SignPlane, ...]


def pack_signs(parts: Sequence[SignPart], *, gated: bool) -> PackedSigns | None:
    """The planes of all parts; None: there are none.

    Args:
        parts: in the order of the outputs.
        gated: the outputs are a gate and an up projection, to be interleaved.
    """
    if not any(part.planes for part in parts):
        return None
    ends = list(itertools.accumulate(part.num_outputs for part in parts))
    outputs = packed_order(ends[-1], gated=gated).view(-1, UNIT)  # [units, UNIT]
    column_scales: list[Tensor] = []
    blocks, units, scales = [], [], []
    for part, end in zip(parts, ends, strict=True):
        own = outputs - (end - part.num_outputs)
        is_own = (own >= 0) & (own < part.num_outputs)
        (places,) = is_own.any(dim=1).nonzero(as_tuple=True)
        own, is_own = own[places].clamp(0, part.num_outputs - 1), is_own[places]
        for plane in part.planes:
            row_scale = torch.where(is_own, plane.row_scale.float()[own], 0.0)  # [units of the part, UNIT]
            (known,) = row_scale.any(dim=1).nonzero(as_tuple=True)  # a plane may be 0 in some, as of a gate alone
            words = _words(plane.bits)[own[known]].transpose(1, 2)  # [known units of the part, words, UNIT]
            blocks.append(torch.cat([row_scale[known].view(torch.int32)[:, None], words], dim=1))
            units.append(places[known])
            scale = _index_of(_padded_column_scale(plane), column_scales)
            scales.append(torch.full_like(units[-1], scale))
    unit = torch.cat(units)
    order = unit.argsort(stable=True)
    starts = torch.zeros(len(outputs) + 1, dtype=torch.int64)
    torch.cumsum(torch.bincount(unit, minlength=len(outputs)), 0, out=starts[1:])
    return PackedSigns(torch.cat(blocks)[order], starts, torch.cat(scales)[order], torch.stack(column_scales))


def _words(bits: Tensor) -> Tensor:
    """[N, ceil(K / 8)] uint8 -> [N, ceil(K / 32)] int32"""
    return functional.pad(bits, (0, -bits.shape[1] % 4)).contiguous().view(torch.int32)


def _padded_column_scale(plane: SignPlane) -> Tensor:
    """-> [K padded to words] float32; what is beyond K meets inputs that are 0."""
    num_padded = -(-plane.bits.shape[1] // 4) * WORD
    if plane.column_scale is None:
        return torch.ones(num_padded)
    return functional.pad(plane.column_scale.float(), (0, num_padded - len(plane.column_scale)))


def _index_of(scale: Tensor, known: list[Tensor]) -> int:
    """The place of an equal tensor, which is added if there is none."""
    for index, other in enumerate(known):
        if torch.equal(scale, other):
            return index
    known.append(scale)
    return len(known) - 1

"""A variant's terms in the layout of the base's packed weight: fused parts, gated pairs, padded panels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from delta.variant_terms import EmbeddingTerms, LinearTerms
from model_worker.engine.ops.cpu.step_variants import UNIT, PackedEmbedding, PackedLinear
from model_worker.engine.ops.linear.packed_weight import PANEL, interleave_gated


class LinearPart(NamedTuple):
    """One part of a fused linear layer: its outputs, and its terms, if it has any."""

    num_outputs: int
    terms: LinearTerms


def pack_linear(parts: Sequence[LinearPart], *, gated: bool, dtype: torch.dtype) -> PackedLinear:
    """The terms of a fused linear layer.

    Args:
        parts: in the order of the outputs. An input scale is given only where there is one part.
        gated: the outputs are a gate and an up projection, to be interleaved.
        dtype: of A, B and Z.
    """
    terms = [part.terms for part in parts]
    matrices = [term.a for term in terms if term.a is not None]
    b, units = _pack_b(parts, gated=gated, dtype=dtype) if matrices else (None, None)
    dense = _joined(parts, [term.dense for term in terms], gated=gated, fill=0.0, dtype=dtype)
    return PackedLinear(
        a=_pack_a(torch.cat(matrices).to(dtype)) if matrices else None,
        b=b,
        units=units,
        output_scale=_joined(parts, [term.output_scale for term in terms], gated=gated, fill=1.0),
        input_scale=None if terms[0].input_scale is None else terms[0].input_scale.float(),
        dense=None if dense is None else dense.view(-1, PANEL, dense.shape[1]).transpose(1, 2).contiguous(),
        bias=_joined(parts, [term.bias for term in terms], gated=gated, fill=0.0),
    )


def interleave_pairs(numbers: Tensor) -> Tensor:
    """[..., 2, UNIT] in the order of the kernels: of bfloat16 the two of a pair are side by side; float32 stays."""
    return numbers.transpose(-1, -2).contiguous() if numbers.dtype == torch.bfloat16 else numbers


def pack_embedding(terms: EmbeddingTerms, *, dtype: torch.dtype) -> PackedEmbedding:
    """The terms of an embedding, rows first."""
    return PackedEmbedding(
        token_ids=terms.token_ids,
        rows=None if terms.rows is None else terms.rows.to(dtype),
        a=None if terms.a is None else terms.a.to(dtype).T.contiguous(),
        b=None if terms.b is None else terms.b.to(dtype).T.contiguous(),
    )


def _pack_a(a: Tensor) -> Tensor:
    """[r, K] -> [r, K padded]"""
    missing = -a.shape[1] % (2 * UNIT)
    padded = functional.pad(a, (0, missing)) if missing else a
    return interleave_pairs(padded.view(len(a), -1, 2, UNIT)).view(len(a), -1)


def _pack_b(parts: Sequence[LinearPart], *, gated: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """-> B of all units, and where in it and in the ranks each unit is [N / UNIT, 3]"""
    total = sum(part.terms.rank for part in parts)
    columns, ranges = [], []  # of each part: B [n, total], and of each output its first rank and the end of its ranks
    first = 0
    for num_outputs, terms in parts:
        column = torch.zeros(num_outputs, total, dtype=dtype)
        limits = torch.tensor([[total, 0]])  # no ranks at all
        if terms.b is not None:
            column[:, first : first + terms.rank] = terms.b
            limits = torch.tensor([[first, first + terms.rank]])
        columns.append(column)
        ranges.append(limits.expand(num_outputs, 2))
        first += terms.rank
    # Padding has no ranks either, though its range is [0, 0).
    units = _ordered(columns, gated=gated).view(-1, UNIT, total)
    limits = _ordered(ranges, gated=gated).view(-1, UNIT, 2)
    ends = limits[:, :, 1].amax(dim=1)
    firsts = limits[:, :, 0].where(limits[:, :, 1] > 0, total).amin(dim=1).minimum(ends)
    counts = ends - firsts
    offsets = torch.zeros_like(counts)
    pieces, size = [], 0
    for kind in sorted(set((firsts * (total + 1) + counts).tolist())):  # units of equal ranks: few kinds, whatever N is
        start, count = divmod(kind, total + 1)
        places = ((firsts == start) & (counts == count)).nonzero().squeeze(1)
        ranks = units[places, :, start : start + count].transpose(1, 2)  # [units, count, UNIT]
        if count % 2 and dtype == torch.bfloat16:
            ranks = functional.pad(ranks, (0, 0, 0, 1))
        stored = ranks.shape[1]
        if dtype == torch.bfloat16:
            ranks = interleave_pairs(ranks.unflatten(1, (stored // 2, 2)))
        pieces.append(ranks.flatten())
        offsets[places] = size + torch.arange(len(places)) * stored * UNIT
        size += len(pieces[-1])
    return torch.cat(pieces), torch.stack([offsets, firsts, counts], dim=1)


def _joined(
    parts: Sequence[LinearPart],
    tensors: Sequence[Tensor | None],
    *,
    gated: bool,
    fill: float,
    dtype: torch.dtype = torch.float32,
) -> Tensor | None:
    """Tensors [n, ...] of the parts as one [N padded, ...]; parts that have none are filled. None: no part has one."""
    known = next((tensor for tensor in tensors if tensor is not None), None)
    if known is None:
        return None
    filled = [
        torch.full((part.num_outputs, *known.shape[1:]), fill, dtype=dtype) if tensor is None else tensor.to(dtype)
        for part, tensor in zip(parts, tensors, strict=True)
    ]
    return _ordered(filled, gated=gated)


def _ordered(tensors: Sequence[Tensor], *, gated: bool) -> Tensor:
    """Rows of the parts in the order of the packed outputs, padded with zeros. -> [N padded, ...]"""
    if gated:
        gate, up = tensors if len(tensors) == 2 else tensors[0].chunk(2)
        return interleave_gated(gate, up)
    missing = -sum(len(tensor) for tensor in tensors) % PANEL
    return torch.cat([*tensors, tensors[0].new_zeros(missing, *tensors[0].shape[1:])])

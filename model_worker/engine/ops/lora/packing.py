"""A variant's terms in the layout of the base's packed weight: fused parts, gated pairs, padded panels."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
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


class LinearPacker:
    """Packs layers of variants, and keeps the table of units of each combination of shape and ranks for the next one.

    Several threads may use it.

    Args:
        dtype: of A, B and Z.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._layouts: dict[tuple[tuple[int, ...], tuple[int, ...], bool], UnitLayout] = {}

    def pack(self, parts: Sequence[LinearPart], *, gated: bool) -> PackedLinear:
        """The terms of a fused linear layer.

        Args:
            parts: in the order of the outputs. An input scale is given only where there is one part.
            gated: the outputs are a gate and an up projection, to be interleaved.
        """
        terms, dtype = [part.terms for part in parts], self._dtype
        matrices = [term.a for term in terms if term.a is not None]
        a = b = units = None
        if matrices:
            layout = self._layout(parts, gated=gated)
            a, b, units = _pack_a(matrices, dtype), _pack_b(parts, layout, gated=gated, dtype=dtype), layout.table
        dense = _joined(parts, [term.dense for term in terms], gated=gated, fill=0.0, dtype=dtype)
        return PackedLinear(
            a=a,
            b=b,
            units=units,
            output_scale=_joined(parts, [term.output_scale for term in terms], gated=gated, fill=1.0),
            input_scale=None if terms[0].input_scale is None else terms[0].input_scale.float(),
            dense=None if dense is None else dense.view(-1, PANEL, dense.shape[1]).transpose(1, 2).contiguous(),
            bias=_joined(parts, [term.bias for term in terms], gated=gated, fill=0.0),
        )

    def _layout(self, parts: Sequence[LinearPart], *, gated: bool) -> UnitLayout:
        sizes, ranks = tuple(part.num_outputs for part in parts), tuple(part.terms.rank for part in parts)
        key = (sizes, ranks, gated)
        layout = self._layouts.get(key)
        if layout is None:
            layout = self._layouts.setdefault(key, UnitLayout(sizes, ranks, gated=gated, dtype=self._dtype))
        return layout


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


def _pack_a(matrices: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """[r, K] of the parts -> [r of all, K padded]"""
    a = torch.cat([matrix.to(dtype) for matrix in matrices])
    missing = -a.shape[1] % (2 * UNIT)
    padded = functional.pad(a, (0, missing)) if missing else a
    return interleave_pairs(padded.view(len(a), -1, 2, UNIT)).view(len(a), -1)


class _UnitKind(NamedTuple):
    """Units whose outputs have the same ranks [first, first + num_ranks)."""

    places: slice
    first: int
    num_ranks: int


class UnitLayout:
    """Where the ranks of each unit are; the same for all layers whose parts have these sizes and ranks.

    Attributes:
        kinds: of units that have ranks at all, in the order in which B is kept.
        table: [N / UNIT, 3] int64; see `PackedLinear.units`.
    """

    def __init__(self, sizes: Sequence[int], ranks: Sequence[int], *, gated: bool, dtype: torch.dtype) -> None:
        ends = list(itertools.accumulate(ranks))
        limits = []  # of each output of a part: its first rank and the end of its ranks; of none and of padding 0, 0
        for size, rank, end in zip(sizes, ranks, ends, strict=True):
            limits.append(torch.tensor([[end - rank, end] if rank else [0, 0]]).expand(size, 2))
        firsts, ends_of_unit = _ordered(limits, gated=gated).view(-1, UNIT, 2).unbind(2)
        firsts = firsts.where(ends_of_unit > 0, ends[-1]).amin(dim=1)
        units: dict[tuple[int, int], list[int]] = {}
        for unit, (first, end) in enumerate(zip(firsts.tolist(), ends_of_unit.amax(dim=1).tolist(), strict=True)):
            if end > 0:
                units.setdefault((first, end - first), []).append(unit)
        self.kinds: list[_UnitKind] = []
        self.table = torch.zeros(len(firsts), 3, dtype=torch.int64)
        size = 0
        for (first, num_ranks), places in units.items():
            stored = num_ranks + num_ranks % 2 if dtype == torch.bfloat16 else num_ranks
            for run in _evenly_spaced(places):
                self.kinds.append(_UnitKind(run, first, num_ranks))
                num_units = len(self.table[run])
                self.table[run, 0] = size + torch.arange(num_units) * stored * UNIT
                self.table[run, 1], self.table[run, 2] = first, num_ranks
                size += num_units * stored * UNIT


def _evenly_spaced(places: list[int]) -> Iterator[slice]:
    """Ascending numbers as slices: the fewest that a look at the next two gives."""
    start = 0
    while start < len(places):
        step = places[start + 1] - places[start] if start + 1 < len(places) else 1
        end = start + 1
        while end < len(places) and places[end] - places[end - 1] == step:
            end += 1
        yield slice(places[start], places[end - 1] + 1, step)
        start = end


def _pack_b(parts: Sequence[LinearPart], layout: UnitLayout, *, gated: bool, dtype: torch.dtype) -> Tensor:
    """B of all units."""
    total = sum(part.terms.rank for part in parts)
    columns, end = [], 0
    for num_outputs, terms in parts:
        column = torch.zeros(num_outputs, total, dtype=dtype)
        end += terms.rank
        if terms.b is not None:
            column[:, end - terms.rank : end] = terms.b
        columns.append(column)
    units = _ordered(columns, gated=gated).view(-1, UNIT, total)
    pieces = []
    for places, first, num_ranks in layout.kinds:
        ranks = units[places, :, first : first + num_ranks]  # [units, UNIT, ranks]
        if dtype == torch.bfloat16:  # pairs of ranks side by side, as `interleave_pairs` has them
            ranks = functional.pad(ranks, (0, 1)) if num_ranks % 2 else ranks
            pieces.append(ranks.reshape(len(ranks), UNIT, -1, 2).transpose(1, 2).flatten())
        else:
            pieces.append(ranks.transpose(1, 2).flatten())
    return torch.cat(pieces)


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

"""A variant's terms in the layout of the base's packed weight: fused parts, gated pairs, padded panels."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from delta.extra_tokens import given_rows
from delta.variant_terms import EmbeddingTerms, LinearTerms
from model_worker.engine.ops.cpu.step_variants import UNIT, PackedEmbedding, PackedLinear
from model_worker.engine.ops.linear.packed_weight import PANEL, interleave_gated
from model_worker.engine.ops.sign_planes.packing import SignPart, pack_signs
from model_worker.engine.ops.sparse_matrix.packing import SparsePart, pack_sparse

_MAX_LAYOUTS = 256  # that are kept


class LinearPart(NamedTuple):
    """One part of a fused linear layer: its outputs, and its terms, if it has any."""

    num_outputs: int
    terms: LinearTerms


class LinearLayer(NamedTuple):
    """A fused linear layer.

    Attributes:
        parts: in the order of the outputs. An input scale is given only where there is one part.
        gated: the outputs are a gate and an up projection, to be interleaved.
    """

    parts: tuple[LinearPart, ...]
    gated: bool


class _LowRankShape(NamedTuple):
    """What layers have in common whose A and B are packed together.

    Attributes:
        sizes, ranks: of the parts.
        num_inputs: 0: there is no A.
    """

    sizes: tuple[int, ...]
    ranks: tuple[int, ...]
    num_inputs: int
    gated: bool

    @classmethod
    def of(cls, layer: LinearLayer) -> _LowRankShape:
        return cls(
            tuple(part.num_outputs for part in layer.parts),
            tuple(part.terms.rank for part in layer.parts),
            max(0 if part.terms.a is None else part.terms.a.shape[1] for part in layer.parts),
            layer.gated,
        )

    @property
    def total_rank(self) -> int:
        return sum(self.ranks)


class LinearPacker:
    """Packs the layers of variants. Layers of one shape are packed together, in a few operations on large tensors.

    Args:
        dtype: of A, B and Z.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._layout = functools.lru_cache(maxsize=_MAX_LAYOUTS)(functools.partial(UnitLayout, dtype=dtype))

    def pack(self, layers: Sequence[LinearLayer]) -> list[PackedLinear]:
        """The terms of fused linear layers."""
        of_shape: dict[_LowRankShape, list[int]] = {}
        for index, layer in enumerate(layers):
            if (shape := _LowRankShape.of(layer)).total_rank:
                of_shape.setdefault(shape, []).append(index)
        packed = [self._pack_others(layer) for layer in layers]
        for shape, indices in of_shape.items():
            layout = self._layout(shape.sizes, shape.ranks, gated=shape.gated)
            together = [layers[index].parts for index in indices]
            a, b = _pack_a(together, shape, self._dtype), _pack_b(together, shape, layout, self._dtype)
            for index, of_a, of_b in zip(indices, a, b, strict=True):
                packed[index] = replace(packed[index], a=of_a, b=of_b, units=layout.table)
        return packed

    def _pack_others(self, layer: LinearLayer) -> PackedLinear:
        """All terms but A and B."""
        parts, gated = layer
        terms, dtype = [part.terms for part in parts], self._dtype
        dense = _joined(parts, [term.dense for term in terms], gated=gated, fill=0.0, dtype=dtype)
        return PackedLinear(
            output_scale=_joined(parts, [term.output_scale for term in terms], gated=gated, fill=1.0),
            input_scale=None if terms[0].input_scale is None else terms[0].input_scale.float(),
            dense=None if dense is None else dense.view(-1, PANEL, dense.shape[1]).transpose(1, 2).contiguous(),
            bias=_joined(parts, [term.bias for term in terms], gated=gated, fill=0.0),
            signs=pack_signs([SignPart(part.num_outputs, part.terms.signs) for part in parts], gated=gated),
            sparse=pack_sparse(
                [SparsePart(part.num_outputs, part.terms.sparse) for part in parts], gated=gated, dtype=dtype
            ),
        )


def interleave_pairs(numbers: Tensor) -> Tensor:
    """[..., 2, UNIT] in the order of the kernels: of bfloat16 the two of a pair are side by side; float32 stays."""
    return numbers.transpose(-1, -2).contiguous() if numbers.dtype == torch.bfloat16 else numbers


def pack_embedding(terms: EmbeddingTerms, num_rows: int, *, dtype: torch.dtype) -> PackedEmbedding:
    """The terms of an embedding [num_rows, H] but its planes, rows first."""
    token_ids, rows = given_rows(terms, num_rows)
    return PackedEmbedding(
        num_rows=num_rows,
        token_ids=token_ids,
        rows=None if rows is None else rows.to(dtype),
        a=None if terms.a is None else terms.a.to(dtype).T.contiguous(),
        b=None if terms.b is None else terms.b.to(dtype).T.contiguous(),
    )


def _pack_a(layers: Sequence[Sequence[LinearPart]], shape: _LowRankShape, dtype: torch.dtype) -> Tensor:
    """[r, K] of the parts of each layer -> [layers, r of all parts, K padded]"""
    num_padded = shape.num_inputs + -shape.num_inputs % (2 * UNIT)
    a = torch.empty(len(layers) * shape.total_rank, num_padded, dtype=dtype)
    a[:, shape.num_inputs :] = 0
    matrices = [part.terms.a for parts in layers for part in parts if part.terms.a is not None]
    for place, matrix in zip(a.split_with_sizes(list(map(len, matrices))), matrices, strict=True):
        place[:, : shape.num_inputs] = matrix
    return interleave_pairs(a.view(len(a), -1, 2, UNIT)).view(len(layers), shape.total_rank, -1)


class _UnitKind(NamedTuple):
    """Units whose outputs have the same ranks [first, first + num_ranks).

    Attributes:
        outputs: [units, UNIT] int64, those of the unpacked layer; one more than there are: padding.
    """

    outputs: Tensor
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
        outputs = _ordered(
            torch.split_with_sizes(torch.arange(1, sum(sizes) + 1), list(sizes)), gated=gated
        )  # of padding 0
        outputs_of_units = torch.where(outputs > 0, outputs - 1, sum(sizes)).view(-1, UNIT)
        units: dict[tuple[int, int], list[int]] = {}
        for unit, (first, end) in enumerate(zip(firsts.tolist(), ends_of_unit.amax(dim=1).tolist(), strict=True)):
            if end > 0:
                units.setdefault((first, end - first), []).append(unit)
        self.kinds: list[_UnitKind] = []
        self.table = torch.zeros(len(firsts), 3, dtype=torch.int64)
        size = 0
        for (first, num_ranks), places in units.items():
            stored = num_ranks + num_ranks % 2 if dtype == torch.bfloat16 else num_ranks
            self.kinds.append(_UnitKind(outputs_of_units[places], first, num_ranks))
            self.table[places, 0] = size + torch.arange(len(places)) * stored * UNIT
            self.table[places, 1], self.table[places, 2] = first, num_ranks
            size += len(places) * stored * UNIT


def _pack_b(
    layers: Sequence[Sequence[LinearPart]], shape: _LowRankShape, layout: UnitLayout, dtype: torch.dtype
) -> Tensor:
    """B of all units of each layer. -> [layers, numbers]"""
    outputs = torch.zeros(len(layers), sum(shape.sizes) + 1, shape.total_rank, dtype=dtype)  # the last one is padding
    row = rank = 0
    for part, (size, num_ranks) in enumerate(zip(shape.sizes, shape.ranks, strict=True)):
        places = outputs[:, row : row + size, rank : rank + num_ranks].unbind()
        for place, parts in zip(places, layers, strict=True):
            if (b := parts[part].terms.b) is not None:
                place.copy_(b)
        row, rank = row + size, rank + num_ranks
    pieces = []
    for outputs_of_units, first, num_ranks in layout.kinds:
        ranks = outputs[:, outputs_of_units.flatten(), first : first + num_ranks]
        if dtype == torch.bfloat16:  # pairs of ranks side by side, as `interleave_pairs` has them: they move as one
            ranks = functional.pad(ranks, (0, 1)) if num_ranks % 2 else ranks
            ranks = ranks.contiguous().view(torch.int32)
        pieces.append(ranks.reshape(len(layers), -1, UNIT, ranks.shape[2]).transpose(2, 3).flatten(1))
    return (pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)).view(dtype)


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

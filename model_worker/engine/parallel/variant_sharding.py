"""What a rank has of a variant: its terms, divided as the base's weights are.

    y = e ∘ ((d ∘ x) Wᵀ) + Σ u ∘ ((v ∘ x) Sᵀ) + (x Aᵀ) Bᵀ + x Zᵀ + c

    W by outputs    rows of e, u, S, B, Z and c; all of d, v, A
    W by inputs     columns of d, v, S, A, Z; all of e, u, B; c on rank 0 and 0 on others, because their y are added up

An embedding is divided by its rows. Rows beyond the base's are given to one rank: those of an embedding to the last,
those of the output head to rank 0, which makes their logits by itself. All ranks have terms of the same kinds: what
they compute with, graphs or not, depends on these.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from delta.codecs.packed_bits import pack_bits, unpack_bits
from delta.variant_terms import EmbeddingTerms, LinearTerms, SignPlane, SparseMatrix, VariantTerms
from model_worker.engine.parallel.sharding import Division, Share, cut


def divide_variant(terms: VariantTerms, divisions: Mapping[str, Division], share: Share) -> VariantTerms:
    """The terms that a rank has.

    Args:
        divisions: by module, or by parameter where that is none of a linear layer or embedding; others are whole.
    """
    return replace(
        terms,
        linears={path: _linear(each, divisions.get(path), share) for path, each in terms.linears.items()},
        experts={
            path: {expert: _linear(each, divisions.get(path), share) for expert, each in of_experts.items()}
            for path, of_experts in terms.experts.items()
        },
        embeddings={path: _embedding(each, divisions.get(path), share) for path, each in terms.embeddings.items()},
        vectors={
            path: cut(each, 0, divisions[path], share) if path in divisions else each
            for path, each in terms.vectors.items()
        },
    )


def _linear(terms: LinearTerms, division: Division | None, share: Share) -> LinearTerms:
    first = share.rank == 0
    extra_rows, extra_bias = (terms.extra_rows, terms.extra_bias) if first else (None, None)
    if division is None:
        return replace(terms, extra_rows=extra_rows, extra_bias=extra_bias)
    if division.by_inputs:
        return replace(
            terms,
            a=_cut(terms.a, 1, division, share),
            input_scale=_cut(terms.input_scale, 0, division, share),
            dense=_cut(terms.dense, 1, division, share),
            bias=terms.bias if first or terms.bias is None else torch.zeros_like(terms.bias),
            signs=tuple(_plane_columns(plane, division, share) for plane in terms.signs),
            sparse=None if terms.sparse is None else _sparse_columns(terms.sparse, division, share),
            extra_rows=extra_rows,
            extra_bias=extra_bias,
        )
    return replace(
        terms,
        b=_cut(terms.b, 0, division, share),
        output_scale=_cut(terms.output_scale, 0, division, share),
        dense=_cut(terms.dense, 0, division, share),
        bias=_cut(terms.bias, 0, division, share),
        signs=tuple(_plane_rows(plane, division, share) for plane in terms.signs),
        sparse=None if terms.sparse is None else _sparse_rows(terms.sparse, division, share),
        extra_rows=extra_rows,
        extra_bias=extra_bias,
    )


def _embedding(terms: EmbeddingTerms, division: Division | None, share: Share) -> EmbeddingTerms:
    if division is None:
        return terms
    ((start, end),) = division.ranges(share)
    token_ids, rows = terms.token_ids, terms.rows
    if token_ids is not None and rows is not None:
        mine = (token_ids >= start) & (token_ids < end)
        token_ids, rows = (token_ids[mine] - start, rows[mine]) if bool(mine.any()) else (None, None)
    return EmbeddingTerms(
        token_ids=token_ids,
        rows=rows,
        a=_cut(terms.a, 1, division, share),
        b=terms.b,
        signs=tuple(_plane_rows(plane, division, share) for plane in terms.signs),
        extra_rows=terms.extra_rows if share.rank == share.num_ranks - 1 else None,
    )


def _cut(tensor: Tensor | None, axis: int, division: Division | None, share: Share) -> Tensor | None:
    return tensor if tensor is None or division is None else cut(tensor, axis, division, share)


def _plane_rows(plane: SignPlane, division: Division, share: Share) -> SignPlane:
    return SignPlane(cut(plane.bits, 0, division, share), cut(plane.row_scale, 0, division, share), plane.column_scale)


def _plane_columns(plane: SignPlane, division: Division, share: Share) -> SignPlane:
    num_columns = sum(part.size for part in division.parts)
    mine = cut(torch.from_numpy(unpack_bits(plane.bits, num_columns)), 1, division, share)
    return SignPlane(pack_bits(mine.numpy()), plane.row_scale, _cut(plane.column_scale, 0, division, share))


def _sparse_rows(matrix: SparseMatrix, division: Division, share: Share) -> SparseMatrix:
    lengths = cut(matrix.row_starts.diff(), 0, division, share)
    stretches = [
        slice(int(matrix.row_starts[start]), int(matrix.row_starts[end])) for start, end in division.ranges(share)
    ]
    return SparseMatrix(
        _starts(lengths),
        torch.cat([matrix.columns[stretch] for stretch in stretches]),
        torch.cat([matrix.values[stretch] for stretch in stretches]),
    )


def _sparse_columns(matrix: SparseMatrix, division: Division, share: Share) -> SparseMatrix:
    num_columns = sum(part.size for part in division.parts)
    place = torch.full((num_columns,), -1, dtype=torch.int32)  # of each column among the rank's
    mine = cut(torch.arange(num_columns), 0, division, share)
    place[mine] = torch.arange(len(mine), dtype=torch.int32)
    columns = place[matrix.columns.long()]
    kept = columns >= 0
    lengths = torch.zeros(len(matrix.row_starts) - 1, dtype=torch.int64)
    rows = torch.repeat_interleave(torch.arange(len(lengths)), matrix.row_starts.diff())
    lengths.index_add_(0, rows, kept.long())
    return SparseMatrix(_starts(lengths), columns[kept], matrix.values[kept])


def _starts(lengths: Tensor) -> Tensor:
    """[N] -> [N + 1]"""
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])

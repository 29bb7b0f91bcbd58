"""Terms of one matrix added up, cut into blocks of rows, put together from such blocks, and transposed.

Shapes as in `delta.variant_terms`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from delta.codecs.packed_bits import pack_bits, unpack_bits
from delta.merge_terms import rows_of, sparse_to_dense
from delta.variant_terms import LinearTerms, SignPlane, SparseMatrix


def add_up(parts: Sequence[LinearTerms], num_columns: int) -> LinearTerms:
    """The terms of one matrix [N, num_columns] that several codecs gave; they scale nothing and have no bias."""
    low_rank = [(terms.a, terms.b) for terms in parts if terms.a is not None and terms.b is not None]
    dense = [terms.dense for terms in parts if terms.dense is not None]
    sparse = [terms.sparse for terms in parts if terms.sparse is not None]
    if len(sparse) > 1 or dense:
        dense += [sparse_to_dense(matrix, num_columns) for matrix in sparse]
        sparse = []
    return LinearTerms(
        a=torch.cat([a for a, _ in low_rank]) if low_rank else None,
        b=torch.cat([b for _, b in low_rank], dim=1) if low_rank else None,
        dense=_sum(dense),
        signs=tuple(plane for terms in parts for plane in terms.signs),
        sparse=sparse[0] if sparse else None,
    )


def _sum(matrices: Sequence[Tensor]) -> Tensor | None:
    if len(matrices) < 2:
        return matrices[0] if matrices else None
    return torch.stack([matrix.float() for matrix in matrices]).sum(0)


def block_of_rows(terms: LinearTerms, rows: slice) -> LinearTerms:
    """Those of some rows of the matrix; may share memory."""
    return LinearTerms(
        a=terms.a,
        b=None if terms.b is None else terms.b[rows],
        dense=None if terms.dense is None else terms.dense[rows],
        signs=tuple(SignPlane(plane.bits[rows], plane.row_scale[rows], plane.column_scale) for plane in terms.signs),
        sparse=None if terms.sparse is None else _sparse_rows(terms.sparse, rows),
    )


def stacked(blocks: Sequence[tuple[int, LinearTerms]], num_columns: int) -> LinearTerms:
    """Those of a matrix from those of its blocks of rows, one below the other; they have no input scale and no bias.

    Args:
        blocks: number of rows, and terms.
    """
    sizes, parts = [size for size, _ in blocks], [terms for _, terms in blocks]
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    low_rank = [(start, terms.a, terms.b) for start, terms in zip(starts, parts, strict=True) if terms.a is not None]
    a = torch.cat([a for _, a, _ in low_rank]) if low_rank else None
    b = [_placed(b, start, sum(sizes)) for start, _, b in low_rank if b is not None]
    scales = [torch.ones(size) if terms.output_scale is None else terms.output_scale.float() for size, terms in blocks]
    dense = next((terms.dense for terms in parts if terms.dense is not None), None)
    has_sparse = any(terms.sparse is not None for terms in parts)
    return LinearTerms(
        a=a,
        b=torch.cat(b, dim=1) if b else None,
        output_scale=torch.cat(scales) if any(terms.output_scale is not None for terms in parts) else None,
        dense=None if dense is None else torch.cat([_dense(*block, num_columns, dense.dtype) for block in blocks]),
        signs=tuple(
            SignPlane(
                _placed(plane.bits, start, sum(sizes)), _placed(plane.row_scale, start, sum(sizes)), plane.column_scale
            )
            for start, terms in zip(starts, parts, strict=True)
            for plane in terms.signs
        ),
        sparse=_stacked_sparse(blocks) if has_sparse and dense is None else None,
    )


def _placed(rows: Tensor, start: int, num_rows: int) -> Tensor:
    """The rows [n, ...] from `start` on of a tensor [num_rows, ...] that is 0 elsewhere."""
    placed = rows.new_zeros(num_rows, *rows.shape[1:])
    placed[start : start + len(rows)] = rows
    return placed


def _dense(num_rows: int, terms: LinearTerms, num_columns: int, dtype: torch.dtype) -> Tensor:
    if terms.dense is not None:
        return terms.dense
    if terms.sparse is not None:
        return sparse_to_dense(terms.sparse, num_columns)
    return torch.zeros(num_rows, num_columns, dtype=dtype)


def _stacked_sparse(blocks: Sequence[tuple[int, LinearTerms]]) -> SparseMatrix:
    counts = [
        torch.zeros(size, dtype=torch.int64) if terms.sparse is None else terms.sparse.row_starts.diff()
        for size, terms in blocks
    ]
    ends = torch.cat(counts).cumsum(0)
    known = [terms.sparse for _, terms in blocks if terms.sparse is not None]
    return SparseMatrix(
        torch.cat([ends.new_zeros(1), ends]),
        torch.cat([matrix.columns for matrix in known]),
        torch.cat([matrix.values for matrix in known]),
    )


def transposed(terms: LinearTerms, num_columns: int) -> LinearTerms:
    """The terms of Dᵀ [num_columns, N], from those of D [N, num_columns]."""
    return LinearTerms(
        a=None if terms.b is None else terms.b.T.contiguous(),
        b=None if terms.a is None else terms.a.T.contiguous(),
        dense=None if terms.dense is None else terms.dense.T.contiguous(),
        signs=tuple(_transposed_plane(plane, num_columns) for plane in terms.signs),
        sparse=None if terms.sparse is None else _transposed_sparse(terms.sparse, num_columns),
    )


def _transposed_plane(plane: SignPlane, num_columns: int) -> SignPlane:
    column_scale = plane.column_scale
    return SignPlane(
        bits=pack_bits(unpack_bits(plane.bits, num_columns).T),
        row_scale=torch.ones(num_columns) if column_scale is None else column_scale,
        column_scale=plane.row_scale,
    )


def _sparse_rows(matrix: SparseMatrix, rows: slice) -> SparseMatrix:
    starts = matrix.row_starts[rows.start : rows.stop + 1]
    values = slice(int(starts[0]), int(starts[-1]))
    return SparseMatrix(starts - starts[0], matrix.columns[values], matrix.values[values])


def _transposed_sparse(matrix: SparseMatrix, num_columns: int) -> SparseMatrix:
    order = torch.argsort(matrix.columns, stable=True)  # rows stay ascending in each column
    counts = torch.bincount(matrix.columns, minlength=num_columns)
    starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return SparseMatrix(starts, rows_of(matrix)[order].int(), matrix.values[order])

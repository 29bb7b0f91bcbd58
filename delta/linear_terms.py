"""Terms of one matrix added up, cut into blocks of rows, and transposed. Shapes as in `delta.variant_terms`."""

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

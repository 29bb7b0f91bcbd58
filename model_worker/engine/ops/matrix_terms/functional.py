"""Products with matrices of variants, dense and sparse, for the few rows that a decode step has of each.

    out[row, columns of part p] += x[row] Z[p]^T        for each row of a segment, and each part that has a Z there

    add_matrices(x, out, table, widths, plan)      in place

        x       [T, K], out [T, N] of one dtype, rows contiguous
        Z       [N of the part, K] of x's dtype, dense and contiguous, or sparse as in `SparseMatrix`
        table   [P, variants, TABLE_COLUMNS] int64 on the device, of `table_row`; the plan's tiles name variants
        widths  [P], columns of each part

Sums are float32 and rounded once. A captured graph serves any rows. Steps with prompts and CPUs compute such terms by
segments, one after the other, with torch's products: `layers/row_terms.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from delta.variant_terms import SparseMatrix
from model_worker.engine.ops.low_rank import SegmentPlan

TABLE_COLUMNS = 6
"""Address of a dense Z, or of a sparse one's row starts, columns and values; first of out's columns, how many."""


def table_row(dense: Tensor | None, sparse: SparseMatrix | None, first_column: int, width: int) -> Tensor:
    """What the kernel has to know of one variant and part. -> [TABLE_COLUMNS] int64; zeros where it has no Z"""
    row = torch.zeros(TABLE_COLUMNS, dtype=torch.int64)
    if dense is not None:
        row[0] = dense.data_ptr()
    elif sparse is not None:
        row[1], row[2], row[3] = sparse.row_starts.data_ptr(), sparse.columns.data_ptr(), sparse.values.data_ptr()
    else:
        return row
    row[4], row[5] = first_column, width
    return row


def add_matrices(x: Tensor, out: Tensor, table: Tensor, widths: Sequence[int], plan: SegmentPlan) -> None:
    """See the module's docstring."""
    from model_worker.engine.ops.matrix_terms import triton  # not installed where there is no GPU

    triton.add_matrices(x, out, table, widths, plan)

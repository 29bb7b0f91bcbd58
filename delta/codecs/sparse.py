"""`sparse`: the numbers that changed, exactly."""

from __future__ import annotations

import torch
from torch import Tensor

from delta.codecs.codec import Parts, Term
from delta.codecs.part_checks import check_finite, check_names, check_part
from delta.same_bits import same_bits
from delta.variant_terms import LinearTerms, SparseMatrix

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MAX_SHORT_COLUMNS = 1 << 15


class Sparse:
    """D is 0 but for the numbers given. A `DifferenceCodec`.

    Parts: row_counts [N] int32: how many there are in each row; columns [nnz], int16 where K ≤ 32768, else int32,
    ascending in each row; values [nnz], float32, bfloat16 or float16.
    """

    name = "sparse"

    def check(self, parts: Parts, shape: tuple[int, int]) -> None:
        num_rows, num_columns = shape
        check_names(parts, "row_counts", "columns", "values")
        counts = check_part(parts, "row_counts", (torch.int32,), (num_rows,))
        if bool((counts < 0).any()):
            raise ValueError("row_counts has numbers below 0")
        num_values = int(counts.sum())
        columns = check_part(parts, "columns", (_column_dtype(num_columns),), (num_values,)).long()
        check_part(parts, "values", _DTYPES, (num_values,))
        check_finite(parts, "values")
        if bool(((columns < 0) | (columns >= num_columns)).any()):
            raise ValueError(f"columns has some that are not in 0 to {num_columns - 1}")
        places = _rows(counts) * num_columns + columns
        if bool((places.diff() <= 0).any()):
            raise ValueError("columns are not ascending in each row")

    def add_to(self, weight: Tensor, parts: Parts) -> None:
        # Places are given once each, so this is no sum of several in some order.
        weight[_rows(parts["row_counts"]), parts["columns"].long()] += parts["values"].float()

    def terms(self, parts: Parts, shape: tuple[int, int]) -> LinearTerms:
        counts = parts["row_counts"].long()
        row_starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        return LinearTerms(sparse=SparseMatrix(row_starts, parts["columns"].int(), parts["values"]))


SPARSE = Sparse()


def encode_sparse(base: Tensor, target: Tensor) -> Term | None:
    """D in the fine-tune's dtype where that is exact, else in float32; None: no difference gives all its bits back."""
    if not (base.is_floating_point() and target.is_floating_point()) or target.dtype not in _DTYPES:
        return None
    rows, columns = torch.nonzero(base.float() != target.float(), as_tuple=True)
    # Where nothing changed, casting W is all there is to do.
    if not same_bits(torch.index_put(base.to(target.dtype), (rows, columns), target[rows, columns]), target):
        return None
    before, after = base[rows, columns].float(), target[rows, columns]
    for dtype in dict.fromkeys((target.dtype, torch.float32)):
        values = (after.float() - before).to(dtype)
        if same_bits((before + values.float()).to(target.dtype), after) and bool(values.isfinite().all()):
            counts = torch.bincount(rows, minlength=len(base)).int()
            columns = columns.to(_column_dtype(base.shape[1]))
            return Term(SPARSE.name, {"row_counts": counts, "columns": columns, "values": values})
    return None


def _column_dtype(num_columns: int) -> torch.dtype:
    return torch.int16 if num_columns <= _MAX_SHORT_COLUMNS else torch.int32


def _rows(counts: Tensor) -> Tensor:
    """The row of each value. [N] -> [nnz] int64"""
    return torch.repeat_interleave(torch.arange(len(counts)), counts)

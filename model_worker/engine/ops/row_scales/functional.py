"""Rows of a step that variants scale and shift.

    out[t] = round(e ∘ x[t] + f)            e, f: of the variant of row t; rows of the base, e = 1 and f = 0

    scale_rows(x, out, table, numbers)

        x, out    [T, N] of one dtype, rows contiguous; out may be x
        e, f      [N] float32; each may be missing
        table     [variants, TABLE_COLUMNS] int64 on the device, of `table_row`
        numbers   [T] integers, 1 + number of the variant of each row; 0: the base

Computed in float32. A captured graph serves any rows, because all is read from the table and the numbers. On CPUs the
segments of a step are scaled one after the other, by `layers/row_terms.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

TABLE_COLUMNS = 2
"""Addresses of e and f; 0: missing."""


def table_row(scale: Tensor | None, shift: Tensor | None) -> Tensor:
    """What the kernel has to know of one variant. -> [TABLE_COLUMNS] int64"""
    return torch.tensor([0 if each is None else each.data_ptr() for each in (scale, shift)])


def scale_rows(x: Tensor, out: Tensor, table: Tensor, numbers: Tensor) -> None:
    """See the module's docstring."""
    from model_worker.engine.ops.row_scales import triton  # not installed where there is no GPU

    triton.scale_rows(x, out, table, numbers)

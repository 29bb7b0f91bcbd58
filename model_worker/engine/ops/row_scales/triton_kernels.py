"""Scales and shifts of variants on GPUs. Shapes and tables as in functional.py."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["numbers"])  # a graph's begin wherever those of a step end
def scale_rows_kernel(x, out, table, numbers, size, x_stride, out_stride, COPIES: tl.constexpr, BLOCK: tl.constexpr):
    """Program (row, columns). COPIES: rows of the base are written too."""
    row = tl.program_id(0).to(tl.int64)
    number = tl.load(numbers + row)
    scale = tl.load(table + (number - 1) * 2, mask=number > 0, other=0)
    shift = tl.load(table + (number - 1) * 2 + 1, mask=number > 0, other=0)
    if COPIES or scale != 0 or shift != 0:
        columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        has_column = columns < size
        total = tl.load(x + row * x_stride + columns, mask=has_column, other=0.0).to(tl.float32)
        if scale != 0:
            total *= tl.load(scale.to(tl.pointer_type(tl.float32)) + columns, mask=has_column, other=0.0)
        if shift != 0:
            total += tl.load(shift.to(tl.pointer_type(tl.float32)) + columns, mask=has_column, other=0.0)
        tl.store(out + row * out_stride + columns, total.to(out.dtype.element_ty), mask=has_column)

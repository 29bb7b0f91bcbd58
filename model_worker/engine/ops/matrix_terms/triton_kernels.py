"""Products with variants' matrices on GPUs. Shapes and tables as in functional.py; sums are float32.

A sparse matrix is multiplied row by row and output by output: some numbers of each, gathered from the row and added up.
"""

import triton
import triton.language as tl

from model_worker.engine.ops.reductions import add, larger


@triton.jit
def add_matrices_kernel(
    x,
    out,
    tiles,
    table,
    num_inputs,
    num_variants,
    x_stride,
    out_stride,
    TILE_ROWS: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
    BLOCK_INPUTS: tl.constexpr,
    BLOCK_VALUES: tl.constexpr,
    TABLE_COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Program (tile, outputs, part): out[rows, outputs] += x[rows] Z[outputs]^T

    x [T, K], out [T, N], tiles [num_tiles, 3], table [P, variants, TABLE_COLUMNS].
    """
    tile = tiles + tl.program_id(0) * 3
    number, count = tl.load(tile), tl.load(tile + 2)
    part = tl.program_id(2)
    entry = table + (part * num_variants + number) * TABLE_COLUMNS
    width = tl.load(entry + 5, mask=count > 0, other=0).to(tl.int32)
    first_output = tl.program_id(1) * BLOCK_OUTPUTS
    if first_output < width:
        dense = tl.load(entry)
        rows = tl.load(tile + 1).to(tl.int64) + tl.arange(0, TILE_ROWS)
        has_row = tl.arange(0, TILE_ROWS) < count
        outputs = first_output + tl.arange(0, BLOCK_OUTPUTS)
        has_output = outputs < width
        sums = tl.full((TILE_ROWS, BLOCK_OUTPUTS), 0.0, dtype=tl.float32)
        if dense != 0:
            z = tl.multiple_of(dense.to(tl.pointer_type(x.dtype.element_ty)), 16)
            for begin in range(0, num_inputs, BLOCK_INPUTS):
                inputs = begin + tl.arange(0, BLOCK_INPUTS)
                has_input = inputs < num_inputs
                x_tile = tl.load(
                    x + rows[:, None] * x_stride + inputs[None, :],
                    mask=has_row[:, None] & has_input[None, :],
                    other=0.0,
                )
                z_tile = tl.load(
                    z + outputs[None, :].to(tl.int64) * num_inputs + inputs[:, None],
                    mask=has_output[None, :] & has_input[:, None],
                    other=0.0,
                )
                sums = tl.dot(x_tile.to(tl.float32), z_tile.to(tl.float32), sums, input_precision=PRECISION)
        else:
            starts = tl.load(entry + 1).to(tl.pointer_type(tl.int64))
            columns = tl.load(entry + 2).to(tl.pointer_type(tl.int32))
            values = tl.load(entry + 3).to(tl.pointer_type(x.dtype.element_ty))
            begins = tl.load(starts + outputs, mask=has_output, other=0)
            ends = tl.load(starts + outputs + 1, mask=has_output, other=0)
            longest = tl.reduce(ends - begins, 0, larger)
            for index in range(count):  # the rows that there are: mostly one
                row = x + (tl.load(tile + 1).to(tl.int64) + index) * x_stride
                partial = tl.full((BLOCK_OUTPUTS, BLOCK_VALUES), 0.0, dtype=tl.float32)
                for first_value in range(0, longest, BLOCK_VALUES):
                    places = begins[:, None] + first_value + tl.arange(0, BLOCK_VALUES)[None, :]
                    has_value = places < ends[:, None]
                    gathered = tl.load(columns + places, mask=has_value, other=0)
                    z_values = tl.load(values + places, mask=has_value, other=0.0).to(tl.float32)
                    partial += tl.load(row + gathered, mask=has_value, other=0.0).to(tl.float32) * z_values
                of_row = (tl.arange(0, TILE_ROWS) == index)[:, None]
                sums += tl.where(of_row, tl.reduce(partial, 1, add)[None, :], 0.0)
        first_column = tl.load(entry + 4)
        target = out + rows[:, None] * out_stride + (first_column + outputs)[None, :]
        mask = has_row[:, None] & has_output[None, :]
        tl.store(target, (tl.load(target, mask=mask, other=0.0) + sums).to(out.dtype.element_ty), mask=mask)

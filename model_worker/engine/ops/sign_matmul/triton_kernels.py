"""Planes of signs on GPUs. Shapes and tables as in the package's docstring, bits as in bit_planes.py; sums are float32.

S is 2 M - 1 with M of zeros and ones, so that x S^T is 2 x M^T less the sum of x, which is one number a row.

One row is limited by the instructions for each bit: a bit in the mantissa of 1.0 makes it 1 + M 2^-n, and is multiplied
by 2^n x; the sum of all 2^n x is taken off at the end. That is one logical operation and one multiplication a bit, and
a shift for four of them. More rows are multiplied by tensor cores; v x is rounded to the dtype of x there.
"""

import triton
import triton.language as tl

from model_worker.engine.ops.reductions import add


@triton.jit
def add_signs_kernel(
    x,
    out,
    tiles,
    table,
    num_inputs,
    num_outputs,
    x_stride,
    out_stride,
    one,
    NUM_PLANES: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_BITS: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
    TABLE_COLUMNS: tl.constexpr,
    PRODUCT_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Program (tile, outputs): out[rows, outputs] += sum over planes of u ((v x[rows]) S[outputs]^T)

    x [T, K], out [T, N], tiles [num_tiles, 3], table [S, NUM_PLANES, TABLE_COLUMNS]; one: see `_of_row`. One row is
    multiplied with BLOCKS of bits at once, more rows with BLOCK_BITS of the words of a block.
    """
    tile = tiles + tl.program_id(0) * 3
    segment, count = tl.load(tile), tl.load(tile + 2)
    first_row = tl.load(tile + 1).to(tl.int64)
    outputs = tl.program_id(1) * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS)
    has_output = outputs < num_outputs
    entry = table + segment * NUM_PLANES * TABLE_COLUMNS
    num_blocks = tl.load(entry + 3, mask=count > 0, other=0).to(tl.int32)
    if num_blocks > 0:
        if count == 1:
            row = x + first_row * x_stride
            total = tl.full((BLOCK_OUTPUTS,), 0.0, dtype=tl.float32)
            plane = 0
            while num_blocks > 0:
                total += _of_row(row, entry, outputs, has_output, num_blocks, num_inputs, one, BLOCKS, BLOCK_OUTPUTS)
                plane += 1
                entry += TABLE_COLUMNS
                num_blocks = tl.load(entry + 3, mask=plane < NUM_PLANES, other=0).to(tl.int32)
            target = out + first_row * out_stride + outputs
            total += tl.load(target, mask=has_output, other=0.0).to(tl.float32)
            tl.store(target, total.to(out.dtype.element_ty), mask=has_output)
        else:
            rows = first_row + tl.arange(0, TILE_ROWS)
            has_row = tl.arange(0, TILE_ROWS) < count
            totals = tl.full((TILE_ROWS, BLOCK_OUTPUTS), 0.0, dtype=tl.float32)
            plane = 0
            while num_blocks > 0:
                totals += _of_rows(
                    x + rows * x_stride,
                    has_row,
                    entry,
                    outputs,
                    has_output,
                    num_blocks,
                    num_inputs,
                    TILE_ROWS,
                    BLOCK_BITS,
                    BLOCK_OUTPUTS,
                    PRODUCT_DTYPE,
                    PRECISION,
                )
                plane += 1
                entry += TABLE_COLUMNS
                num_blocks = tl.load(entry + 3, mask=plane < NUM_PLANES, other=0).to(tl.int32)
            targets = out + rows[:, None] * out_stride + outputs[None, :]
            mask = has_row[:, None] & has_output[None, :]
            totals += tl.load(targets, mask=mask, other=0.0).to(tl.float32)
            tl.store(targets, totals.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _of_row(
    row, entry, outputs, has_output, num_blocks, num_inputs, one, BLOCKS: tl.constexpr, BLOCK_OUTPUTS: tl.constexpr
):
    """u ((v x) S^T) of the row of x at `row`. -> [outputs]

    one: the bits of 1.0, no constant, so that it stays in a register: an instruction has room for one constant only.
    """
    words = tl.multiple_of(tl.load(entry).to(tl.pointer_type(tl.int32)), 16)
    u = tl.multiple_of(tl.load(entry + 1).to(tl.pointer_type(tl.float32)), 16)
    v = tl.multiple_of(tl.load(entry + 2).to(tl.pointer_type(tl.float32)), 16)
    word, block = tl.arange(0, 32), tl.arange(0, BLOCKS)
    sums = tl.full((BLOCK_OUTPUTS, BLOCKS, 32), 0.0, dtype=tl.float32)
    of_large = tl.full((BLOCKS, 32), 0.0, dtype=tl.float32)
    of_x = tl.full((BLOCKS, 32), 0.0, dtype=tl.float32)
    of_output = words + (outputs.to(tl.int64) * num_blocks * 32)[:, None, None] + word[None, None, :]
    for step in range((num_blocks + BLOCKS - 1) // BLOCKS * 4):  # bytes of the words of some blocks
        blocks, byte = step // 4 * BLOCKS + block, step % 4
        packed = tl.load(
            of_output + blocks[None, :, None] * 32,
            mask=has_output[:, None, None] & (blocks < num_blocks)[None, :, None],
            other=0,
        )
        packed = packed >> (8 * byte)
        inputs = (blocks * 1024 + byte * 256)[:, None] + word[None, :]  # of the lowest bit
        for bit in tl.static_range(8):
            has_input = inputs < num_inputs - bit * 32
            scale = tl.load(v + inputs + bit * 32, mask=has_input, other=0.0)
            values = tl.load(row + inputs + bit * 32, mask=has_input, other=0.0).to(tl.float32) * scale
            # The bit comes to one of the upper four of the mantissa, 19 to 22.
            shifted = packed << (19 - bit // 4 * 4)
            large = values * (1 << (4 - bit % 4))
            ones = ((shifted & (1 << (19 + bit % 4))) | one).to(tl.float32, bitcast=True)
            sums += ones * large[None, :, :]
            of_large += large
            of_x += values
    less = 2.0 * tl.reduce(tl.reduce(of_large, 1, add), 0, add) + tl.reduce(tl.reduce(of_x, 1, add), 0, add)
    return (2.0 * tl.reduce(tl.reduce(sums, 2, add), 1, add) - less) * tl.load(u + outputs, mask=has_output, other=0.0)


@triton.jit
def _of_rows(
    rows,
    has_row,
    entry,
    outputs,
    has_output,
    num_blocks,
    num_inputs,
    TILE_ROWS: tl.constexpr,
    BLOCK_BITS: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
    PRODUCT_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """u ((v x) S^T) of the rows of x at `rows`. -> [rows, outputs]"""
    words = tl.multiple_of(tl.load(entry).to(tl.pointer_type(tl.int32)), 16)
    u = tl.multiple_of(tl.load(entry + 1).to(tl.pointer_type(tl.float32)), 16)
    v = tl.multiple_of(tl.load(entry + 2).to(tl.pointer_type(tl.float32)), 16)
    steps: tl.constexpr = 32 // BLOCK_BITS
    sums = tl.full((TILE_ROWS, BLOCK_OUTPUTS), 0.0, dtype=tl.float32)
    of_x = tl.full((TILE_ROWS,), 0.0, dtype=tl.float32)
    for step in range(num_blocks * steps):
        block, first_bit = step // steps, step % steps * BLOCK_BITS
        packed = tl.load(
            words + (outputs.to(tl.int64) * num_blocks + block)[:, None, None] * 32 + tl.arange(0, 32)[None, None, :],
            mask=has_output[:, None, None],
            other=0,
        )  # [outputs, 1, 32]
        ones = ((packed >> first_bit) >> tl.arange(0, BLOCK_BITS)[None, :, None]) & 1
        # The number whose highest bit but the sign is the only one is 2 in every type.
        if PRODUCT_DTYPE.primitive_bitwidth == 16:
            twos = (ones << 14).to(tl.int16).to(PRODUCT_DTYPE, bitcast=True)
        else:
            twos = (ones << 30).to(PRODUCT_DTYPE, bitcast=True)
        inputs = step * BLOCK_BITS * 32 + tl.arange(0, BLOCK_BITS * 32)
        has_input = inputs < num_inputs
        values = tl.load(rows[:, None] + inputs[None, :], mask=has_row[:, None] & has_input[None, :], other=0.0)
        scaled = (values.to(tl.float32) * tl.load(v + inputs, mask=has_input, other=0.0)[None, :]).to(values.dtype)
        of_x += tl.reduce(scaled.to(tl.float32), 1, add)
        twos = tl.reshape(twos, (BLOCK_OUTPUTS, BLOCK_BITS * 32))
        sums = tl.dot(scaled.to(PRODUCT_DTYPE), tl.trans(twos), sums, input_precision=PRECISION)
    return (sums - of_x[:, None]) * tl.load(u + outputs, mask=has_output, other=0.0)[None, :]

"""Planes of signs on GPUs. Shapes and tables as in the package's docstring, bits as in bit_planes.py; sums are float32.

One row is multiplied as triton_row.py says. More rows are multiplied by tensor cores with numbers -v and +v, where v is
rounded to the dtype of x.

Words of bits become numbers with these signs, two numbers of 16 bits at once: a shift and a logical operation on the
word that holds both. Where the base's weight is merged with the planes, W + D is the left operand of the product, which
is out^T: on Hopper it goes from registers into `wgmma`, and only the rows of x and W pass through shared memory. In 16
bits two weights take one multiplication with addition more, which leaves W + D rounded once. The words of 1,024 inputs
are read once and kept.
"""

import triton
import triton.language as tl

from model_worker.engine.ops.sign_matmul.triton_row import of_row

_SIGNS_16 = tl.constexpr(-0x7FFF8000)  # 0x80008000, of two numbers
_SIGN_32 = tl.constexpr(-0x80000000)


@triton.jit(do_not_specialize=["num_entries", "num_planes"])  # other numbers in each step
def add_signs_kernel(
    x,
    out,
    tiles,
    table,
    num_inputs,
    num_entries,
    num_planes,
    x_stride,
    out_stride,
    top_bits,
    TILE_ROWS: tl.constexpr,
    NUM_WARPS: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
    TABLE_COLUMNS: tl.constexpr,
    WIDTHS_MULTIPLE: tl.constexpr,
    PRODUCT_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Program (tile, outputs, part): out[rows, outputs] += sum over planes of u ((v x[rows]) S[outputs]^T)

    x [T, K], out [T, N], tiles [num_tiles, 3], table [P, num_entries, num_planes, TABLE_COLUMNS].
    top_bits: see `of_row`.
    """
    tile = tiles + tl.program_id(0) * 3
    count = tl.load(tile + 2)
    first_row = tl.load(tile + 1).to(tl.int64)
    entry = table + (tl.program_id(2) * num_entries + tl.load(tile)) * num_planes * TABLE_COLUMNS
    width = tl.multiple_of(tl.load(entry + 5, mask=count > 0, other=0).to(tl.int32), WIDTHS_MULTIPLE)
    first_output = tl.program_id(1) * BLOCK_OUTPUTS
    first_column = tl.multiple_of(tl.load(entry + 4).to(tl.int32), WIDTHS_MULTIPLE)
    num_blocks = tl.load(entry + 3, mask=first_output < width, other=0).to(tl.int32)
    if num_blocks > 0:
        if count == 1:
            row = x + first_row * x_stride
            total = tl.full((BLOCK_OUTPUTS,), 0.0, dtype=tl.float32)
            plane = 0
            while num_blocks > 0:
                total += of_row(
                    row, entry, first_output, width, num_blocks, num_inputs, top_bits, NUM_WARPS, BLOCK_OUTPUTS
                )
                plane += 1
                entry += TABLE_COLUMNS
                num_blocks = tl.load(entry + 3, mask=plane < num_planes, other=0).to(tl.int32)
            outputs = first_output + tl.arange(0, BLOCK_OUTPUTS)
            has_output = outputs < width
            target = out + first_row * out_stride + first_column + outputs
            total += tl.load(target, mask=has_output, other=0.0).to(tl.float32)
            tl.store(target, total.to(out.dtype.element_ty), mask=has_output)
        else:
            outputs = first_output + tl.arange(0, BLOCK_OUTPUTS)
            has_output = outputs < width
            rows = first_row + tl.arange(0, TILE_ROWS)
            has_row = tl.arange(0, TILE_ROWS) < count
            totals = tl.full((BLOCK_OUTPUTS, TILE_ROWS), 0.0, dtype=tl.float32)
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
                    BLOCK_OUTPUTS,
                    PRODUCT_DTYPE,
                    PRECISION,
                )
                plane += 1
                entry += TABLE_COLUMNS
                num_blocks = tl.load(entry + 3, mask=plane < num_planes, other=0).to(tl.int32)
            targets = out + rows[None, :] * out_stride + (first_column + outputs)[:, None]
            mask = has_row[None, :] & has_output[:, None]
            totals += tl.load(targets, mask=mask, other=0.0).to(tl.float32)
            tl.store(targets, totals.to(out.dtype.element_ty), mask=mask)


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
    BLOCK_OUTPUTS: tl.constexpr,
    PRODUCT_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """u ((S v) x^T) of the rows of x at `rows`. -> [outputs, rows]"""
    bits = tl.multiple_of(tl.load(entry).to(tl.pointer_type(tl.int32)), 16)
    u = tl.multiple_of(tl.load(entry + 1).to(tl.pointer_type(tl.float32)), 16)
    v = tl.multiple_of(tl.load(entry + 2).to(tl.pointer_type(tl.float32)), 16)
    words_at = bits + outputs.to(tl.int64)[:, None] * (num_blocks * 32) + tl.arange(0, 32)[None, :]
    words = tl.full((BLOCK_OUTPUTS, 32), 0, dtype=tl.int32)
    minus_one = _negative_bits(tl.full((1, 1), 1.0, dtype=PRODUCT_DTYPE))
    sums = tl.full((BLOCK_OUTPUTS, TILE_ROWS), 0.0, dtype=tl.float32)
    for step in range((num_inputs + 63) // 64):
        if step % 16 == 0:
            words = tl.load(words_at + step // 16 * 32, mask=has_output[:, None], other=0)
        inputs = step * 64 + tl.arange(0, 64)
        has_input = inputs < num_inputs
        values = tl.load(rows[None, :] + inputs[:, None], mask=has_row[None, :] & has_input[:, None], other=0.0)
        scale = tl.load(v + inputs, mask=has_input, other=0.0).to(PRODUCT_DTYPE)
        scaled = _signed(words, step % 16, minus_one, BLOCK_OUTPUTS, PRODUCT_DTYPE) * scale[None, :]
        sums = tl.dot(scaled, values.to(PRODUCT_DTYPE), sums, input_precision=PRECISION)
    return sums * tl.load(u + outputs, mask=has_output, other=0.0)[:, None]


@triton.jit
def merged_linear_kernel(
    x,
    out,
    weight,
    bias,
    tiles,
    table,
    num_inputs,
    num_entries,
    x_stride,
    out_stride,
    MAX_PLANES: tl.constexpr,
    NUM_PLANES: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
    TABLE_COLUMNS: tl.constexpr,
    WIDTHS_MULTIPLE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRODUCT_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Program (tile, outputs, part): out[rows, outputs] = x[rows] round(W[outputs] + planes)^T + b[outputs]

    x [T, K], out [T, N], weight [N, K], bias [N], tiles [num_tiles, 3], table [P, num_entries, MAX_PLANES,
    TABLE_COLUMNS]. NUM_PLANES is 1 or 2. Rows and outputs beyond the last are those of the last, and not written.
    """
    tile = tiles + tl.program_id(0) * 3
    count = tl.load(tile + 2)
    entry = table + (tl.program_id(2) * num_entries + tl.load(tile)) * MAX_PLANES * TABLE_COLUMNS
    first_column = tl.multiple_of(tl.load(entry + 4).to(tl.int32), WIDTHS_MULTIPLE)
    width = tl.multiple_of(tl.load(entry + 5).to(tl.int32), WIDTHS_MULTIPLE)
    first_output = tl.program_id(1) * BLOCK_OUTPUTS
    if first_output < width:
        rows = tl.load(tile + 1).to(tl.int64) + tl.minimum(tl.arange(0, TILE_ROWS), count - 1)
        outputs = tl.minimum(first_output + tl.arange(0, BLOCK_OUTPUTS), width - 1)
        words_at, negative, v, num_scaled = _plane(entry, outputs, num_inputs, PRODUCT_DTYPE)
        words = tl.full((BLOCK_OUTPUTS, 32), 0, dtype=tl.int32)
        if NUM_PLANES == 2:
            words_at_2, negative_2, v_2, num_scaled_2 = _plane(
                entry + TABLE_COLUMNS, outputs, num_inputs, PRODUCT_DTYPE
            )
            words_2 = tl.full((BLOCK_OUTPUTS, 32), 0, dtype=tl.int32)
        sums = tl.full((BLOCK_OUTPUTS, TILE_ROWS), 0.0, dtype=tl.float32)
        lane = tl.arange(0, 64)
        x_at = x + rows[None, :] * x_stride + lane[:, None]
        weight_at = weight + (first_column + outputs).to(tl.int64)[:, None] * num_inputs + lane[None, :]
        for step in range((num_inputs + 63) // 64):
            bit = step % 16
            if (bit == 0) & (num_scaled > 0):
                words = tl.load(words_at + step // 16 * 32)
            if NUM_PLANES == 2:  # noqa: SIM102 - known to the compiler, unlike the next condition
                if (bit == 0) & (num_scaled_2 > 0):
                    words_2 = tl.load(words_at_2 + step // 16 * 32)
            inputs = step * 64 + lane
            has_input = inputs < num_inputs
            of_base = tl.load(weight_at + step * 64, mask=has_input[None, :], other=0.0).to(PRODUCT_DTYPE)
            values = tl.load(x_at + step * 64, mask=has_input[:, None], other=0.0).to(PRODUCT_DTYPE)
            scale = tl.load(v + inputs, mask=inputs < num_scaled, other=0.0).to(PRODUCT_DTYPE)[None, :]
            numbers = _signed(words, bit, negative, BLOCK_OUTPUTS, PRODUCT_DTYPE)
            if NUM_PLANES == 2:
                # First both planes: only one sum is rounded to what a weight's size leaves of precision.
                scale_2 = tl.load(v_2 + inputs, mask=inputs < num_scaled_2, other=0.0).to(PRODUCT_DTYPE)[None, :]
                numbers_2 = _signed(words_2, bit, negative_2, BLOCK_OUTPUTS, PRODUCT_DTYPE)
                merged = of_base + tl.fma(numbers, scale, numbers_2 * scale_2)
            else:
                merged = tl.fma(numbers, scale, of_base)
            merged = merged.to(weight.dtype.element_ty).to(PRODUCT_DTYPE)
            sums = tl.dot(merged, values, sums, input_precision=PRECISION)
        if HAS_BIAS:
            sums += tl.load(bias + first_column + outputs).to(tl.float32)[:, None]
        written = first_output + tl.arange(0, BLOCK_OUTPUTS)
        target = out + rows[None, :] * out_stride + (first_column + written)[:, None]
        mask = (tl.arange(0, TILE_ROWS) < count)[None, :] & (written < width)[:, None]
        tl.store(target, sums.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _plane(entry, outputs, num_inputs, DTYPE: tl.constexpr):
    """Where the words of the first block are [outputs, 32], bits of -u [outputs, 1], where v is, and how many it has.

    Without a plane: u is 0, and v has none.
    """
    bits = tl.multiple_of(tl.load(entry).to(tl.pointer_type(tl.int32)), 16)
    u = tl.multiple_of(tl.load(entry + 1).to(tl.pointer_type(tl.float32)), 16)
    v = tl.multiple_of(tl.load(entry + 2).to(tl.pointer_type(tl.float32)), 16)
    num_blocks = tl.load(entry + 3).to(tl.int32)
    num_scaled = tl.minimum(num_blocks, 1) * num_inputs
    words_at = bits + outputs.to(tl.int64)[:, None] * (num_blocks * 32) + tl.arange(0, 32)[None, :]
    scale = tl.load(u + outputs, mask=outputs * 0 < num_scaled, other=0.0).to(DTYPE)
    return words_at, _negative_bits(scale)[:, None], v, num_scaled


@triton.jit
def _negative_bits(numbers):
    """The bits of what is negative of the numbers, in 16 bits twice. -> int32 of the same shape"""
    if numbers.dtype.primitive_bitwidth == 16:
        halves = numbers.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        bits = (halves | (halves << 16)) ^ _SIGNS_16
    else:
        bits = numbers.to(tl.int32, bitcast=True) ^ _SIGN_32
    return bits


@triton.jit
def _signed(words, bit, negative, OUTPUTS: tl.constexpr, DTYPE: tl.constexpr):
    """The numbers of the outputs with the signs of 64 inputs. -> [outputs, 64] of the dtype

    words [outputs, 32] of a block; bit of their halves, 0 to 15; negative [outputs, 1] of `_negative_bits`, or [1, 1].
    """
    if DTYPE.primitive_bitwidth == 16:
        pairs = ((words << (15 - bit)) & _SIGNS_16) ^ negative
        low = pairs.to(tl.int16).to(DTYPE, bitcast=True)
        high = (pairs >> 16).to(tl.int16).to(DTYPE, bitcast=True)
    else:
        low = (((words << (31 - bit)) & _SIGN_32) ^ negative).to(DTYPE, bitcast=True)
        high = (((words << (15 - bit)) & _SIGN_32) ^ negative).to(DTYPE, bitcast=True)
    return tl.reshape(tl.join(low, high), (OUTPUTS, 64))

"""Products with quantized weights on GPUs. Shapes and layouts as in functional.py and packed_groups.py.

Sums are float32, or integers that are exact.

One row is limited by the bytes of W, as long as there are few instructions for each number of it: some three where it
is widened to float32. So x becomes integers of 16 bits, whose upper and lower bytes one instruction (DP4A) multiplies
by four numbers of W each and adds up:

    sum of w x = (scale (sum of field q) + (minimum - scale zero) (sum of q)) unit        x = q unit, |q| < 2^15
    sum of field q = 256 (sum of field (q >> 8)) + (sum of field (q & 255))

More rows are multiplied by tensor cores, with weights of x's dtype that are made in registers.
"""

import triton
import triton.language as tl

from model_worker.engine.ops.reductions import add, larger

_LARGEST_FIXED = tl.constexpr(32767.0)
_SMALLEST_PEAK = tl.constexpr(2.0**-100)  # of inputs that are all 0
_ONE_AND_A_HALF_ULPS = tl.constexpr(12582912.0)  # 1.5 * 2^23: a sum with it has the rounded integer in its last bits


@triton.jit
def grouped_row_kernel(
    x,
    words,
    grids,
    bias,
    out,
    num_outputs,
    num_inputs,
    BITS: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
    BLOCK_QUADS: tl.constexpr,
    EMULATED: tl.constexpr,
):
    """Program (outputs): out[outputs] of the one row x [K]; words [N, K / 32, B], grids [N, K / 32], bias [N] or None.

    grids: int32, of 4 bits scale and minimum, the scale in the lower half; float16, of 8 bits. A quad is four words:
    a thread has the same quads of all outputs, so that 32 of them for each warp leave nothing to be exchanged.
    EMULATED: without DP4A, for the interpreter.
    """
    quads_of_group: tl.constexpr = BITS // 4
    num_groups = num_inputs // 32
    outputs = tl.program_id(0) * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS)
    has_output = outputs < num_outputs
    row = outputs.to(tl.int64) * num_groups
    four = tl.arange(0, 4)
    sums = tl.full((BLOCK_OUTPUTS, BLOCK_QUADS), 0.0, dtype=tl.float32)
    for begin in range(0, num_groups * quads_of_group, BLOCK_QUADS):
        quads = begin + tl.arange(0, BLOCK_QUADS)
        groups = quads // quads_of_group
        has_quad = groups < num_groups
        mask = has_output[:, None] & has_quad[None, :]
        packed = tl.load(
            words + (row[:, None] * (quads_of_group * 4) + quads[None, :] * 4)[:, :, None] + four[None, None, :],
            mask=mask[:, :, None],
            other=0,
        )
        grid = tl.load(grids + row[:, None] + groups[None, :], mask=mask, other=0)
        source = x + (groups * 32 + quads % quads_of_group * 4)[:, None] + four[None, :]
        unit = _unit(source, has_quad[:, None], BITS, BLOCK_QUADS)
        factor = (1.0 / unit)[:, None]
        sums_of_x = tl.full((BLOCK_QUADS, 4), 0, dtype=tl.int32)
        sums_of_words = tl.full((BLOCK_OUTPUTS, BLOCK_QUADS, 4), 0, dtype=tl.int32)
        upper_x, lower_x, upper_words, lower_words = sums_of_x, sums_of_x, sums_of_words, sums_of_words
        for part in tl.static_range(8 // BITS):
            upper, lower = _fixed_bytes(source + part * BITS, has_quad[:, None], factor)
            numbers = packed
            if BITS == 4:
                numbers = (packed >> (4 * part)) & 0x0F0F0F0F
            upper_words = _dot4(numbers, upper[None, :, :], upper_words, True, EMULATED)
            lower_words = _dot4(numbers, lower[None, :, :], lower_words, False, EMULATED)
            ones = tl.full((BLOCK_QUADS, 4), 0x01010101, dtype=tl.int32)
            upper_x = _dot4(ones, upper, upper_x, True, EMULATED)
            lower_x = _dot4(ones, lower, lower_x, False, EMULATED)
        total = tl.reduce(upper_words * 256 + lower_words, 2, add).to(tl.float32)
        total_x = tl.reduce(upper_x * 256 + lower_x, 1, add).to(tl.float32)[None, :]
        scale, offset = _scale_and_offset(grid, BITS)
        sums += (scale * total + offset * total_x) * unit[None, :]
    y = tl.reduce(sums, 1, add)
    if bias is not None:
        y += tl.load(bias + outputs, mask=has_output, other=0.0).to(tl.float32)
    tl.store(out + outputs, y.to(out.dtype.element_ty), mask=has_output)


@triton.jit
def _unit(source, mask, BITS: tl.constexpr, BLOCK_QUADS: tl.constexpr):
    """That of each quad's inputs; NaN where one of them is not finite. -> [BLOCK_QUADS] float32"""
    largest = tl.full((BLOCK_QUADS, 4), _SMALLEST_PEAK, dtype=tl.float32)
    for place in tl.static_range(32 // BITS):
        values = tl.load(source + place * BITS, mask=mask, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(values), propagate_nan=tl.PropagateNan.ALL)
    return (tl.reduce(largest, 1, larger) + tl.reduce(largest, 1, add) * 0.0) / _LARGEST_FIXED


@triton.jit
def _fixed_bytes(source, mask, factor):
    """The inputs at `source`, and 8, 16 and 24 behind it, times `factor`, rounded: their upper bytes, and the lower."""
    first, second = _fixed(source, mask, factor), _fixed(source + 8, mask, factor)
    third, fourth = _fixed(source + 16, mask, factor), _fixed(source + 24, mask, factor)
    odd = (first & 0xFFFF) | (third << 16)
    even = (second & 0xFFFF) | (fourth << 16)
    return ((odd >> 8) & 0x00FF00FF) | (even & ~0x00FF00FF), (odd & 0x00FF00FF) | ((even << 8) & ~0x00FF00FF)


@triton.jit
def _fixed(source, mask, factor):
    """int32 whose lower half is the integer; the upper half is anything."""
    values = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    return (values * factor + _ONE_AND_A_HALF_ULPS).to(tl.int32, bitcast=True)


@triton.jit
def _dot4(a, b, c, SIGNED: tl.constexpr, EMULATED: tl.constexpr):
    """c + the sum over four bytes of those of a, which have no sign, times those of b, which have one if SIGNED."""
    if EMULATED:
        for place in tl.static_range(4):
            of_b = (b >> 8 * place) & 255
            if SIGNED:
                of_b = of_b - ((of_b & 128) << 1)
            c += ((a >> 8 * place) & 255) * of_b
    elif SIGNED:
        c = tl.inline_asm_elementwise(
            "dp4a.u32.s32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, c], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        c = tl.inline_asm_elementwise(
            "dp4a.u32.u32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, c], dtype=tl.int32, is_pure=True, pack=1
        )
    return c


@triton.jit
def _scale_and_offset(grid, BITS: tl.constexpr):
    """Of groups, float32: the scale, and what a field of 0 stands for."""
    if BITS == 8:
        scale = grid.to(tl.float32)
        offset = scale * -128.0
    else:
        scale = (grid & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        offset = (grid >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return scale, offset


@triton.jit(do_not_specialize=["num_rows", "split_tiles"])
def grouped_rows_kernel(
    x,
    words,
    grids,
    bias,
    out,
    num_rows,
    num_outputs,
    num_inputs,
    split_tiles,
    x_stride,
    BITS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    PRODUCT_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Program (rows, outputs, split): out[split, rows, outputs] of `split_tiles` tiles of inputs.

    x [T, K], out [splits, T, N], the others as in `grouped_row_kernel`.

    A field of B bits at the top of the mantissa of 2^B makes it 2^B + field, so that three instructions make a weight.
    """
    top: tl.constexpr = 23 - BITS
    power: tl.constexpr = (127 + BITS) << 23  # 2^B
    num_groups = num_inputs // 32
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    has_row = rows < num_rows
    outputs = tl.program_id(1) * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS)
    has_output = outputs < num_outputs
    row = outputs.to(tl.int64) * num_groups
    places = tl.arange(0, 32 // BITS) * BITS
    to_the_left = tl.maximum(top - places, 0)[None, None, :, None]
    to_the_right = tl.maximum(places - top, 0)[None, None, :, None]
    word = tl.arange(0, BITS)[None, None, None, :]
    sums = tl.full((BLOCK_ROWS, BLOCK_OUTPUTS), 0.0, dtype=tl.float32)
    first, num_tiles = tl.program_id(2) * split_tiles, (num_groups + BLOCK_GROUPS - 1) // BLOCK_GROUPS
    for tile in range(first, tl.minimum(first + split_tiles, num_tiles)):
        begin = tile * BLOCK_GROUPS
        groups = begin + tl.arange(0, BLOCK_GROUPS)
        mask = (has_output[:, None] & (groups < num_groups)[None, :])[:, :, None, None]
        of_groups = (row[:, None] + groups[None, :])[:, :, None, None]
        packed = tl.load(words + of_groups * BITS + word, mask=mask, other=0)  # [outputs, groups, 1, B]
        fields = ((packed << to_the_left) >> to_the_right) & (((1 << BITS) - 1) << top)
        numbers = (fields | power).to(tl.float32, bitcast=True)  # [outputs, groups, 32 / B, B]
        scale, offset = _scale_and_offset(tl.load(grids + of_groups, mask=mask, other=0), BITS)
        weights = numbers * scale + (offset - scale * (1 << BITS))
        weights = tl.reshape(weights.to(x.dtype.element_ty), (BLOCK_OUTPUTS, BLOCK_GROUPS * 32))
        inputs = begin * 32 + tl.arange(0, BLOCK_GROUPS * 32)
        values = tl.load(
            x + rows[:, None].to(tl.int64) * x_stride + inputs[None, :],
            mask=has_row[:, None] & (inputs < num_inputs)[None, :],
            other=0.0,
        )
        sums = tl.dot(values.to(PRODUCT_DTYPE), tl.trans(weights.to(PRODUCT_DTYPE)), sums, input_precision=PRECISION)
    _store(out, bias, sums, rows, outputs, has_row, has_output, num_rows, num_outputs)


@triton.jit
def float8_row_kernel(
    x,
    values,
    scales,
    bias,
    out,
    num_outputs,
    num_inputs,
    BLOCK_OUTPUTS: tl.constexpr,
    BLOCK_CHUNKS: tl.constexpr,
):
    """Program (outputs): out[outputs] of the one row x [K]; values [N, K] float8, scales [N], bias [N] or None.

    A thread reads chunks of 16 numbers.
    """
    outputs = tl.program_id(0) * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS)
    has_output = outputs < num_outputs
    row = outputs.to(tl.int64) * num_inputs
    sums = tl.full((BLOCK_OUTPUTS, BLOCK_CHUNKS), 0.0, dtype=tl.float32)
    for begin in range(0, num_inputs, BLOCK_CHUNKS * 16):
        inputs = begin + (tl.arange(0, BLOCK_CHUNKS) * 16)[:, None] + tl.arange(0, 16)[None, :]
        has_input = inputs < num_inputs
        weights = tl.load(
            values + row[:, None, None] + inputs[None, :, :],
            mask=has_output[:, None, None] & has_input[None, :, :],
            other=0.0,
        )
        of_row = tl.load(x + inputs, mask=has_input, other=0.0).to(tl.float32)
        sums += tl.reduce(weights.to(tl.float16).to(tl.float32) * of_row[None, :, :], 2, add)
    y = tl.reduce(sums, 1, add) * tl.load(scales + outputs, mask=has_output, other=0.0)
    if bias is not None:
        y += tl.load(bias + outputs, mask=has_output, other=0.0).to(tl.float32)
    tl.store(out + outputs, y.to(out.dtype.element_ty), mask=has_output)


@triton.jit(do_not_specialize=["num_rows", "split_tiles"])
def float8_rows_kernel(
    x,
    row_scales,
    values,
    scales,
    bias,
    out,
    num_rows,
    num_outputs,
    num_inputs,
    split_tiles,
    x_stride,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
    BLOCK_INPUTS: tl.constexpr,
    PRODUCT_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Program (rows, outputs, split): out[split, rows, outputs] of `split_tiles` tiles of inputs.

    x [T, K], float8 with row_scales [T], or of the product's dtype with None; out [splits, T, N].
    PRODUCT_DTYPE: what both are widened to; None: they are multiplied as float8.
    """
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    has_row = rows < num_rows
    outputs = tl.program_id(1) * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS)
    has_output = outputs < num_outputs
    row = outputs.to(tl.int64) * num_inputs
    sums = tl.full((BLOCK_ROWS, BLOCK_OUTPUTS), 0.0, dtype=tl.float32)
    # Counted in tiles, not in inputs: so the compiler knows that each begins where 16 bytes can be read at once.
    first, num_tiles = tl.program_id(2) * split_tiles, (num_inputs + BLOCK_INPUTS - 1) // BLOCK_INPUTS
    for tile in range(first, tl.minimum(first + split_tiles, num_tiles)):
        inputs = tile * BLOCK_INPUTS + tl.arange(0, BLOCK_INPUTS)
        has_input = inputs < num_inputs
        weights = tl.load(
            values + row[:, None] + inputs[None, :], mask=has_output[:, None] & has_input[None, :], other=0.0
        )
        of_rows = tl.load(
            x + rows[:, None].to(tl.int64) * x_stride + inputs[None, :],
            mask=has_row[:, None] & has_input[None, :],
            other=0.0,
        )
        if PRODUCT_DTYPE is None:
            # Tensor cores of Hopper add float8 products up with 14 bits: only those of a tile, here.
            sums = tl.dot(of_rows, tl.trans(weights), sums, max_num_imprecise_acc=BLOCK_INPUTS)
        else:
            sums = tl.dot(
                of_rows.to(PRODUCT_DTYPE),
                tl.trans(weights.to(tl.float32).to(PRODUCT_DTYPE)),
                sums,
                input_precision=PRECISION,
            )
    sums = sums * tl.load(scales + outputs, mask=has_output, other=0.0)[None, :]
    if row_scales is not None:
        sums = sums * tl.load(row_scales + rows, mask=has_row, other=0.0)[:, None]
    _store(out, bias, sums, rows, outputs, has_row, has_output, num_rows, num_outputs)


@triton.jit
def _store(out, bias, sums, rows, outputs, has_row, has_output, num_rows, num_outputs):
    """out [splits, T, N] of this split = sums + bias [N] or None"""
    if bias is not None:
        sums += tl.load(bias + outputs, mask=has_output, other=0.0).to(tl.float32)[None, :]
    places = tl.program_id(2).to(tl.int64) * num_rows + rows
    target = out + places[:, None] * num_outputs + outputs[None, :]
    tl.store(target, sums.to(out.dtype.element_ty), mask=has_row[:, None] & has_output[None, :])


@triton.jit(do_not_specialize=["num_splits"])
def add_splits_kernel(partial, bias, out, num_splits, num_outputs, BLOCK: tl.constexpr):
    """Program (row, outputs): out[row, outputs] = sum of partial [splits, T, N] over the splits, + bias [N] or None."""
    row, num_rows = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    outputs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    has_output = outputs < num_outputs
    sums = tl.full((BLOCK,), 0.0, dtype=tl.float32)
    for split in range(num_splits):
        places = (split * num_rows + row) * num_outputs + outputs
        sums += tl.load(partial + places, mask=has_output, other=0.0)
    if bias is not None:
        sums += tl.load(bias + outputs, mask=has_output, other=0.0).to(tl.float32)
    tl.store(out + row * num_outputs + outputs, sums.to(out.dtype.element_ty), mask=has_output)


@triton.jit
def quantize_rows_kernel(x, values, scales, num_inputs, x_stride, smallest, BLOCK: tl.constexpr):
    """Program (row): values [T, K] float8 and scales [T] of x [T, K], whose largest become 448."""
    row = tl.program_id(0).to(tl.int64)
    peak = tl.full((), 0.0, dtype=tl.float32)
    for begin in range(0, num_inputs, BLOCK):
        inputs = begin + tl.arange(0, BLOCK)
        piece = tl.load(x + row * x_stride + inputs, mask=inputs < num_inputs, other=0.0).to(tl.float32)
        peak = tl.maximum(peak, tl.reduce(tl.abs(piece), 0, larger))
    scale = tl.maximum(peak / 448.0, smallest)
    tl.store(scales + row, scale)
    for begin in range(0, num_inputs, BLOCK):
        inputs = begin + tl.arange(0, BLOCK)
        piece = tl.load(x + row * x_stride + inputs, mask=inputs < num_inputs, other=0.0).to(tl.float32) / scale
        piece = tl.minimum(tl.maximum(piece, -448.0), 448.0)
        tl.store(values + row * num_inputs + inputs, piece.to(values.dtype.element_ty), mask=inputs < num_inputs)

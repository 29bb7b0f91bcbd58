"""Products with quantized weights on GPUs. Shapes and layouts as in functional.py and packed_groups.py.

Sums are float32.

One row is limited by the bytes of W, and next by the instructions for each number of it. On the CUDA cores these are a
shift, one logical operation and one multiplication: a field of B bits is put at the top of the mantissa of 2^B, which
makes it 2^B + field, and the rest is done once for all numbers that a thread has of a group:

    sum of w x = scale (sum of (2^B + field) x) + (minimum - scale (2^B + zero)) (sum of x)

More rows are multiplied by tensor cores, with weights of x's dtype that are made in registers.
"""

import triton
import triton.language as tl

from model_worker.engine.ops.reductions import add, larger


@triton.jit
def grouped_row_kernel(
    x,
    words,
    grids,
    bias,
    out,
    num_outputs,
    num_inputs,
    power,
    BITS: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
    BLOCK_QUADS: tl.constexpr,
):
    """Program (outputs): out[outputs] of the one row x [K]; words [N, K / 32, B], grids [N, K / 32], bias [N] or None.

    grids: int32, of 4 bits scale and minimum, the scale in the lower half; float16, of 8 bits. A quad is four words.
    power: the bits of 2^B, no constant, so that it stays in a register: an instruction has room for one constant only.
    """
    quads_of_group: tl.constexpr = BITS // 4
    mask_of_field: tl.constexpr = ((1 << BITS) - 1) << (23 - BITS)
    num_groups = num_inputs // 32
    outputs = tl.program_id(0) * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS)
    has_output = outputs < num_outputs
    row = outputs.to(tl.int64) * num_groups
    four = tl.arange(0, 4)
    sums = tl.full((BLOCK_OUTPUTS, BLOCK_QUADS), 0.0, dtype=tl.float32)
    for begin in range(0, num_groups * quads_of_group, BLOCK_QUADS):
        quads = begin + tl.arange(0, BLOCK_QUADS)
        groups = quads // quads_of_group
        mask = has_output[:, None] & (groups < num_groups)[None, :]
        packed = tl.load(
            words + (row[:, None] * (quads_of_group * 4) + quads[None, :] * 4)[:, :, None] + four[None, None, :],
            mask=mask[:, :, None],
            other=0,
        )
        scale, offset = _scale_and_offset(tl.load(grids + row[:, None] + groups[None, :], mask=mask, other=0), BITS)
        products = tl.full((BLOCK_OUTPUTS, BLOCK_QUADS, 4), 0.0, dtype=tl.float32)
        total = tl.full((BLOCK_QUADS, 4), 0.0, dtype=tl.float32)  # of x
        first = groups * 32 + quads % quads_of_group * 4
        for place in tl.static_range(32 // BITS):
            inputs = (first + place * BITS)[:, None] + four[None, :]
            values = tl.load(x + inputs, mask=(groups < num_groups)[:, None], other=0.0).to(tl.float32)
            fields = _at_the_top(packed, 23 - BITS - BITS * place)
            numbers = ((fields & mask_of_field) | power).to(tl.float32, bitcast=True)
            products += numbers * values[None, :, :]
            total += values
        sums += scale * tl.reduce(products, 2, add) + offset * tl.reduce(total, 1, add)[None, :]
    y = tl.reduce(sums, 1, add)
    if bias is not None:
        y += tl.load(bias + outputs, mask=has_output, other=0.0).to(tl.float32)
    tl.store(out + outputs, y.to(out.dtype.element_ty), mask=has_output)


@triton.jit
def _at_the_top(packed, SHIFT: tl.constexpr):
    """Shifted to the left by SHIFT, or to the right by -SHIFT."""
    if SHIFT >= 0:
        shifted = packed << SHIFT
    else:
        shifted = packed >> -SHIFT
    return shifted


@triton.jit
def _scale_and_offset(grid, BITS: tl.constexpr):
    """Of groups, float32: the scale, and what number 0 stands for less 2^BITS times the scale."""
    if BITS == 8:
        scale = grid.to(tl.float32)
        offset = scale * -384.0
    else:
        scale = (grid & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        offset = (grid >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) - scale * 16.0
    return scale, offset


@triton.jit(do_not_specialize=["num_rows"])
def grouped_rows_kernel(
    x,
    words,
    grids,
    bias,
    out,
    num_rows,
    num_outputs,
    num_inputs,
    x_stride,
    BITS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    PRODUCT_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Program (rows, outputs): out[rows, outputs]; x [T, K], out [T, N], the others as in `grouped_row_kernel`."""
    zero: tl.constexpr = 8388608 + (128 if BITS == 8 else 0)  # 2^23, of which the fields are the last bits
    num_groups = num_inputs // 32
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    has_row = rows < num_rows
    outputs = tl.program_id(1) * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS)
    has_output = outputs < num_outputs
    row = outputs.to(tl.int64) * num_groups
    shifts = (tl.arange(0, 32 // BITS) * BITS)[None, None, :, None]
    word = tl.arange(0, BITS)[None, None, None, :]
    sums = tl.full((BLOCK_ROWS, BLOCK_OUTPUTS), 0.0, dtype=tl.float32)
    for begin in range(0, num_groups, BLOCK_GROUPS):
        groups = begin + tl.arange(0, BLOCK_GROUPS)
        mask = (has_output[:, None] & (groups < num_groups)[None, :])[:, :, None, None]
        places = (row[:, None] + groups[None, :])[:, :, None, None]
        packed = tl.load(words + places * BITS + word, mask=mask, other=0)  # [outputs, groups, 1, B]
        fields = ((packed >> shifts) & ((1 << BITS) - 1)) | 0x4B000000
        numbers = fields.to(tl.float32, bitcast=True) - zero  # [outputs, groups, 32 / B, B]
        grid = tl.load(grids + places, mask=mask, other=0)  # [outputs, groups, 1, 1]
        if BITS == 8:
            weights = numbers * grid.to(tl.float32)
        else:
            scale = (grid & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
            minimum = (grid >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
            weights = numbers * scale + minimum
        weights = tl.reshape(weights.to(x.dtype.element_ty), (BLOCK_OUTPUTS, BLOCK_GROUPS * 32))
        inputs = begin * 32 + tl.arange(0, BLOCK_GROUPS * 32)
        values = tl.load(
            x + rows[:, None].to(tl.int64) * x_stride + inputs[None, :],
            mask=has_row[:, None] & (inputs < num_inputs)[None, :],
            other=0.0,
        )
        sums = tl.dot(values.to(PRODUCT_DTYPE), tl.trans(weights.to(PRODUCT_DTYPE)), sums, input_precision=PRECISION)
    _store(out, bias, sums, rows, outputs, has_row, has_output, num_outputs)


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
    BLOCK_INPUTS: tl.constexpr,
):
    """Program (outputs): out[outputs] of the one row x [K]; values [N, K] float8, scales [N], bias [N] or None."""
    outputs = tl.program_id(0) * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS)
    has_output = outputs < num_outputs
    row = outputs.to(tl.int64) * num_inputs
    sums = tl.full((BLOCK_OUTPUTS, BLOCK_INPUTS), 0.0, dtype=tl.float32)
    for begin in range(0, num_inputs, BLOCK_INPUTS):
        inputs = begin + tl.arange(0, BLOCK_INPUTS)
        has_input = inputs < num_inputs
        weights = tl.load(
            values + row[:, None] + inputs[None, :], mask=has_output[:, None] & has_input[None, :], other=0.0
        )
        of_row = tl.load(x + inputs, mask=has_input, other=0.0).to(tl.float32)
        sums += weights.to(tl.float16).to(tl.float32) * of_row[None, :]
    y = tl.reduce(sums, 1, add) * tl.load(scales + outputs, mask=has_output, other=0.0)
    if bias is not None:
        y += tl.load(bias + outputs, mask=has_output, other=0.0).to(tl.float32)
    tl.store(out + outputs, y.to(out.dtype.element_ty), mask=has_output)


@triton.jit(do_not_specialize=["num_rows"])
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
    x_stride,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
    BLOCK_INPUTS: tl.constexpr,
    PRODUCT_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Program (rows, outputs): out[rows, outputs]; x [T, K], float8 with row_scales [T], or of out's dtype with None.

    PRODUCT_DTYPE: what both are widened to; None: they are multiplied as float8.
    """
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    has_row = rows < num_rows
    outputs = tl.program_id(1) * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS)
    has_output = outputs < num_outputs
    row = outputs.to(tl.int64) * num_inputs
    sums = tl.full((BLOCK_ROWS, BLOCK_OUTPUTS), 0.0, dtype=tl.float32)
    for begin in range(0, num_inputs, BLOCK_INPUTS):
        inputs = begin + tl.arange(0, BLOCK_INPUTS)
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
    _store(out, bias, sums, rows, outputs, has_row, has_output, num_outputs)


@triton.jit
def _store(out, bias, sums, rows, outputs, has_row, has_output, num_outputs):
    """out [T, N] = sums + bias [N] or None"""
    if bias is not None:
        sums += tl.load(bias + outputs, mask=has_output, other=0.0).to(tl.float32)[None, :]
    target = out + rows[:, None].to(tl.int64) * num_outputs + outputs[None, :]
    tl.store(target, sums.to(out.dtype.element_ty), mask=has_row[:, None] & has_output[None, :])


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

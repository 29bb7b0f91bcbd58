"""Planes of signs on GPUs. Shapes and tables as in the package's docstring; sums are float32.

v ∘ x is rounded to the dtype of x before it is multiplied, as the tensor cores want it.
"""

import triton
import triton.language as tl


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
    NUM_PLANES: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    BLOCK_INPUTS: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
    TABLE_COLUMNS: tl.constexpr,
    PRODUCT_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Program (tile, outputs): out[rows, outputs] += sum over planes of u ((v x[rows]) S[outputs]^T)

    x [T, K], out [T, N], tiles [num_tiles, 3], table [S, NUM_PLANES, TABLE_COLUMNS].
    """
    tile = tiles + tl.program_id(0) * 3
    segment, count = tl.load(tile), tl.load(tile + 2)
    rows = tl.load(tile + 1).to(tl.int64) + tl.arange(0, TILE_ROWS)
    has_row = tl.arange(0, TILE_ROWS) < count
    outputs = tl.program_id(1) * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS)
    has_output = outputs < num_outputs
    total = tl.full((TILE_ROWS, BLOCK_OUTPUTS), 0.0, dtype=tl.float32)
    for plane in range(NUM_PLANES):
        entry = table + (segment * NUM_PLANES + plane) * TABLE_COLUMNS
        num_words = tl.load(entry + 3, mask=count > 0, other=0)
        if num_words > 0:
            bits = tl.multiple_of(tl.load(entry).to(tl.pointer_type(tl.int32)), 16)
            u = tl.multiple_of(tl.load(entry + 1).to(tl.pointer_type(tl.float32)), 16)
            v = tl.multiple_of(tl.load(entry + 2).to(tl.pointer_type(tl.float32)), 16)
            sums = tl.full((TILE_ROWS, BLOCK_OUTPUTS), 0.0, dtype=tl.float32)
            for begin in range(0, num_inputs, BLOCK_INPUTS):
                inputs = begin + tl.arange(0, BLOCK_INPUTS)
                has_input = inputs < num_inputs
                x_tile = tl.load(
                    x + rows[:, None] * x_stride + inputs[None, :],
                    mask=has_row[:, None] & has_input[None, :],
                    other=0.0,
                ).to(tl.float32)
                scale = tl.load(v + inputs, mask=has_input, other=0.0)
                words = begin // 32 + tl.arange(0, BLOCK_INPUTS // 32)
                packed = tl.load(
                    bits + outputs[:, None].to(tl.int64) * num_words + words[None, :],
                    mask=has_output[:, None] & (words < num_words)[None, :],
                    other=0,
                )
                each = (packed[:, :, None] >> tl.arange(0, 32)[None, None, :]) & 1
                signs = tl.reshape(each, (BLOCK_OUTPUTS, BLOCK_INPUTS)).to(tl.float32) * 2 - 1
                scaled = (x_tile * scale[None, :]).to(x.dtype.element_ty)
                sums = tl.dot(
                    scaled.to(PRODUCT_DTYPE), tl.trans(signs.to(PRODUCT_DTYPE)), sums, input_precision=PRECISION
                )
            total += sums * tl.load(u + outputs, mask=has_output, other=0.0)[None, :]
    target = out + rows[:, None] * out_stride + outputs[None, :]
    mask = has_row[:, None] & has_output[None, :]
    tl.store(target, (tl.load(target, mask=mask, other=0.0) + total).to(out.dtype.element_ty), mask=mask)

"""Gated activations on GPUs. Shapes and roundings as in functional.py."""

import triton
import triton.language as tl


@triton.jit
def gated_activation_kernel(x, out, x_stride, width, IS_SILU: tl.constexpr, BLOCK: tl.constexpr):
    """Program (row, columns): out[row, columns] = activation(gate) * up; x [T, 2 * width], out [T, width]"""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < width
    source = x + row * x_stride + columns
    gate = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(source + width, mask=mask, other=0.0).to(tl.float32)
    if IS_SILU:
        exponent = gate
    else:
        exponent = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
    active = (gate / (1.0 + tl.exp(-exponent))).to(x.dtype.element_ty).to(tl.float32)
    tl.store(out + row * width + columns, (active * up).to(x.dtype.element_ty), mask=mask)

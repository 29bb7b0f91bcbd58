"""Root mean square norms on GPUs. Shapes and roundings as in functional.py; sums are float32.

A program holds what it normalizes in registers: each number is read once and written once.
"""

import triton
import triton.language as tl

from model_worker.engine.ops.reductions import add


@triton.jit(do_not_specialize=["addresses"])  # those of a norm begin where the ones of the norm before end
def rms_norm_kernel(
    x,
    out,
    weight,
    addresses,
    x_stride,
    out_stride,
    num_heads,
    size,
    weight_stride,
    epsilon,
    multiplier,
    ACCUMULATE: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """Program (row, heads): out = y, or out += m y; x, out [T, heads * size], weight [heads or 1, size]

    addresses [T] int64 of the weights of rows, or None: all rows have `weight`.
    """
    row = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    inside = tl.arange(0, BLOCK_SIZE)
    mask = (heads < num_heads)[:, None] & (inside < size)[None, :]
    places = heads[:, None] * size + inside[None, :]
    values = tl.load(x + row * x_stride + places, mask=mask, other=0.0).to(tl.float32)
    mean = tl.reduce(values * values, 1, add) / size
    normalized = values * tl.rsqrt(mean + epsilon)[:, None]
    y = _weighted(normalized, weight, addresses, row, heads[:, None] * weight_stride + inside[None, :], mask, x)
    target = out + row * out_stride + places
    if ACCUMULATE:
        scaled = (y.to(tl.float32) * multiplier).to(y.dtype).to(tl.float32)
        y = (tl.load(target, mask=mask, other=0.0).to(tl.float32) + scaled).to(y.dtype)
    tl.store(target, y, mask=mask)


@triton.jit(do_not_specialize=["addresses"])  # as above
def add_rms_norm_kernel(
    x,
    residual,
    out,
    weight,
    addresses,
    x_stride,
    residual_stride,
    size,
    epsilon,
    multiplier,
    BLOCK_SIZE: tl.constexpr,
):
    """Program (row): residual += m x, out = y of the residual; x, residual, out [T, size], out contiguous

    addresses [T] int64 of the weights of rows, or None: all rows have `weight`.
    """
    row = tl.program_id(0).to(tl.int64)
    inside = tl.arange(0, BLOCK_SIZE)
    mask = inside < size
    target = residual + row * residual_stride + inside
    added = tl.load(x + row * x_stride + inside, mask=mask, other=0.0).to(tl.float32) * multiplier
    added = added.to(x.dtype.element_ty).to(tl.float32)
    total = (tl.load(target, mask=mask, other=0.0).to(tl.float32) + added).to(x.dtype.element_ty)
    tl.store(target, total, mask=mask)
    values = total.to(tl.float32)
    mean = tl.reduce(values * values, 0, add) / size
    normalized = values * tl.rsqrt(mean + epsilon)
    tl.store(out + row * size + inside, _weighted(normalized, weight, addresses, row, inside, mask, x), mask=mask)


@triton.jit
def _weighted(normalized, weight, addresses, row, places, mask, x):
    """y of `normalized` float32, with the weight of this row, in the dtype of x."""
    dtype: tl.constexpr = weight.dtype.element_ty
    if addresses is None:
        weights = tl.load(weight + places, mask=mask, other=0.0)
    else:
        address = tl.load(addresses + row)
        if address == 0:
            weights = tl.load(weight + places, mask=mask, other=0.0)
        else:
            weights = tl.load(address.to(tl.pointer_type(dtype)) + places, mask=mask, other=0.0)
    return (normalized.to(dtype).to(tl.float32) * weights.to(tl.float32)).to(x.dtype.element_ty)

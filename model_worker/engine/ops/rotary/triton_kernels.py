"""Rotary position embedding and KV writing on GPUs. Shapes and roundings as in functional.py."""

import triton
import triton.language as tl

from model_worker.engine.ops.paged_attention.triton_kernels import store


@triton.jit
def rotary_table_kernel(
    positions, inverse_frequencies, cos, sin, attention_scaling, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr
):
    """Program (token): positions [T] int64, inverse_frequencies [HALF] float32 -> cos, sin [T, HALF]"""
    row = tl.program_id(0).to(tl.int64)
    inside = tl.arange(0, BLOCK_HALF)
    mask = inside < HALF
    frequencies = tl.load(inverse_frequencies + inside, mask=mask, other=0.0)
    angles = tl.load(positions + row).to(tl.float32) * frequencies
    dtype: tl.constexpr = cos.dtype.element_ty
    tl.store(cos + row * HALF + inside, (tl.cos(angles) * attention_scaling).to(dtype), mask=mask)
    tl.store(sin + row * HALF + inside, (tl.sin(angles) * attention_scaling).to(dtype), mask=mask)


@triton.jit(do_not_specialize=["slot_mapping"])  # that of a layer group begins where the one before ends
def rotate_and_write_kernel(
    query,
    key,
    value,
    cos,
    sin,
    key_cache,
    value_cache,
    slot_mapping,
    query_stride,
    key_stride,
    value_stride,
    NUM_KV_HEADS: tl.constexpr,
    NUM_SHARED: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_SHARED: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    BLOCK_VALUE_DIM: tl.constexpr,
):
    """Program (token, KV head): rotates its queries in place, and its key on the way to the cache; copies its value.

    Rows of query, key and value are `query_stride`, ... numbers apart; HALF = R / 2; cos and sin [T, HALF].
    """
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = tl.load(slot_mapping + row)
    if slot >= 0:
        inside = tl.arange(0, BLOCK_HALF)
        in_half = inside < HALF
        c = tl.load(cos + row * HALF + inside, mask=in_half, other=0.0).to(tl.float32)[None, :]
        s = tl.load(sin + row * HALF + inside, mask=in_half, other=0.0).to(tl.float32)[None, :]

        heads = tl.arange(0, BLOCK_SHARED)
        q = query + row * query_stride + ((head * NUM_SHARED + heads) * KEY_DIM)[:, None] + inside[None, :]
        q_mask = (heads < NUM_SHARED)[:, None] & in_half[None, :]
        first, second = _rotated(q, q_mask, c, s, HALF)
        tl.store(q, first, mask=q_mask)
        tl.store(q + HALF, second, mask=q_mask)

        k = key + row * key_stride + head * KEY_DIM + inside[None, :]
        first, second = _rotated(k, in_half[None, :], c, s, HALF)
        target = key_cache + (slot * NUM_KV_HEADS + head) * KEY_DIM
        store(target + inside[None, :], first, in_half[None, :])
        store(target + HALF + inside[None, :], second, in_half[None, :])
        if KEY_DIM > 2 * HALF:
            rest = 2 * HALF + tl.arange(0, BLOCK_REST)
            kept = tl.load(key + row * key_stride + head * KEY_DIM + rest, mask=rest < KEY_DIM, other=0.0)
            store(target + rest, kept, rest < KEY_DIM)

        dims = tl.arange(0, BLOCK_VALUE_DIM)
        v = tl.load(value + row * value_stride + head * VALUE_DIM + dims, mask=dims < VALUE_DIM, other=0.0)
        store(value_cache + (slot * NUM_KV_HEADS + head) * VALUE_DIM + dims, v, dims < VALUE_DIM)


@triton.jit
def _rotated(x, mask, c, s, HALF: tl.constexpr):
    """Pointers to the first halves of heads [n, BLOCK_HALF], cos and sin [1, BLOCK_HALF] -> both halves, rotated"""
    dtype: tl.constexpr = x.dtype.element_ty
    first = tl.load(x, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(x + HALF, mask=mask, other=0.0).to(tl.float32)
    # Each product is rounded, as in transformers; that also keeps the compiler from fusing it with the sum.
    turned_first = (first * c).to(dtype).to(tl.float32) - (second * s).to(dtype).to(tl.float32)
    turned_second = (second * c).to(dtype).to(tl.float32) + (first * s).to(dtype).to(tl.float32)
    return turned_first.to(dtype), turned_second.to(dtype)

"""Launches the kernels for GPUs."""

from __future__ import annotations

import torch
from torch import Tensor

from model_worker.engine.ops.rotary.triton_kernels import rotary_table_kernel, rotate_and_write_kernel

_NUMBERS_OF_ONE_WARP = 1024  # of the first halves of heads that share a key; both halves are held in registers


def fill_rotary_table(
    positions: Tensor, inverse_frequencies: Tensor, attention_scaling: float, cos: Tensor, sin: Tensor
) -> None:
    """positions [T], inverse_frequencies [R / 2]; cos and sin [T, R / 2] are written."""
    half = len(inverse_frequencies)
    with torch.cuda.device(positions.get_device()):
        rotary_table_kernel[(len(positions),)](
            positions,
            inverse_frequencies,
            cos,
            sin,
            attention_scaling,
            HALF=half,
            BLOCK_HALF=_power_of_two(half),
            num_warps=1,
        )


def rotate_and_write(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor,
    sin: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
) -> None:
    """See functional.py."""
    num_tokens, num_heads, key_dim = query.shape
    num_kv_heads, value_dim = value.shape[1:]
    half = cos.shape[1]
    for tensor in (query, key, value):
        assert tensor.stride(2) == 1
        assert tensor.stride(1) == tensor.shape[2]
    for tensor in (cos, sin, key_cache, value_cache):
        assert tensor.is_contiguous()
    with torch.cuda.device(query.get_device()):
        rotate_and_write_kernel[(num_tokens, num_kv_heads)](
            query,
            key,
            value,
            cos,
            sin,
            key_cache,
            value_cache,
            slot_mapping,
            query.stride(0),
            key.stride(0),
            value.stride(0),
            NUM_KV_HEADS=num_kv_heads,
            NUM_SHARED=num_heads // num_kv_heads,
            KEY_DIM=key_dim,
            VALUE_DIM=value_dim,
            HALF=half,
            BLOCK_SHARED=_power_of_two(num_heads // num_kv_heads),
            BLOCK_HALF=_power_of_two(half),
            BLOCK_REST=_power_of_two(max(key_dim - 2 * half, 1)),
            BLOCK_VALUE_DIM=_power_of_two(value_dim),
            num_warps=1 if num_heads // num_kv_heads * half <= _NUMBERS_OF_ONE_WARP else 4,
        )


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()

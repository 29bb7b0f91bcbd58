"""Rotary position embedding and writing to the paged KV cache, of tensors in a model's dtype, as GPUs compute it.

    rotary_table(positions, inverse_frequencies, attention_scaling, dtype) -> RotaryCosSin, once a step for all layers

        cos[t, i] = round(cos(p f[i]) * c),  sin[t, i] = round(sin(p f[i]) * c)          p = positions[t], i < R / 2
        the product p f[i] is rounded to float32 first

    rotate_and_write(query, key, value, table, key_cache, value_cache, slot_mapping), for every head x of query and key

        x[i]          <-  round(round(x[i] cos[t, i]) - round(x[i + R / 2] sin[t, i]))
        x[i + R / 2]  <-  round(round(x[i + R / 2] cos[t, i]) + round(x[i] sin[t, i]))
        then key and value of token t go to slot slot_mapping[t] of the caches

        query       [T, H, D], changed in place; heads contiguous, as in columns of a fused qkv buffer
        key         [T, Hkv, D], value [T, Hkv, Dv], likewise; after the call they hold anything
        table       cos, sin [T, R / 2] of query's dtype; elements of a head from R on stay. None: no rotation
        key_cache   [num_blocks, block_size, Hkv, D], value_cache [..., Dv]: query's dtype or float8_e4m3fn, contiguous
        slot_mapping [T] int64; -1: the row only fills a batch up; nothing is written for it, its query is anything

round is to the dtype of query: these are the roundings of transformers' modules. Float8 as in `write_kv`.

Source: Su et al., arXiv 2104.09864, section 3.4.2; the scaling c is that of YaRN, arXiv 2309.00071, section 3.4.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model_worker.engine.ops.paged_attention import write_kv
from model_worker.engine.ops.rotary.reference import RotaryCosSin, rotary_table_reference, rotate_reference

__all__ = ["RotaryCosSin", "rotary_table", "rotate_and_write"]


def rotary_table(
    positions: Tensor, inverse_frequencies: Tensor, attention_scaling: float, dtype: torch.dtype
) -> RotaryCosSin:
    """See the module's docstring.

    Args:
        positions: [T] int64.
        inverse_frequencies: [R / 2] float32.
    """
    if positions.device.type == "cuda":
        from model_worker.engine.ops.rotary import triton  # not installed where there is no GPU

        shape = (len(positions), len(inverse_frequencies))
        # Two tensors: halves of one would not always be aligned, and kernels would be compiled for both cases.
        cos, sin = (torch.empty(shape, dtype=dtype, device=positions.device) for _ in range(2))
        triton.fill_rotary_table(positions, inverse_frequencies, attention_scaling, cos, sin)
        return RotaryCosSin(cos, sin)
    return rotary_table_reference(positions, inverse_frequencies, attention_scaling, dtype)


def rotate_and_write(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    table: RotaryCosSin | None,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
) -> None:
    """See the module's docstring."""
    assert query.dtype == key.dtype == value.dtype
    if table is None:
        write_kv(key, value, key_cache, value_cache, slot_mapping)
        return
    assert table.cos.dtype == table.sin.dtype == query.dtype
    assert 2 * table.cos.shape[1] <= query.shape[2]
    if query.device.type == "cuda":
        from model_worker.engine.ops.rotary import triton  # not installed where there is no GPU

        triton.rotate_and_write(query, key, value, *table, key_cache, value_cache, slot_mapping)
    else:
        rotate_reference(query, *table)
        rotate_reference(key, *table)
        write_kv(key, value, key_cache, value_cache, slot_mapping)

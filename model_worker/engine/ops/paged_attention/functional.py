"""Attention of a flat batch over a paged KV cache, and writing to that cache.

For token t of sequence s, at position p = positions[t], and head h, which reads KV head g = h // (H // Hkv):

    visible   J = { j : first <= j <= p },  first = max(0, p - sliding_window + 1, p - p % chunk_size)
    score     a[j] = cap(scale * query[t, h] . key[s, j, g]) + multiplier * slopes[h] * j      for j in J
              cap(x) = softcap * tanh(x / softcap)
    weight    w[j] = exp(a[j]) / (exp(sinks[h]) + sum over i in J of exp(a[i]))
    output    out[t, h] = sum over j in J of w[j] * value[s, j, g]

Terms of options that are off fall away. key[s, j] is key_cache[block_tables[s, j // block_size], j % block_size].

    paged_attention(query, key_cache, value_cache, metadata, params) -> out [T, H, Dv]

        query        [T, H, D]                               float32, bfloat16 or float16; each head contiguous
        key_cache    [num_blocks, block_size, Hkv, D]        query's dtype or float8_e4m3fn, contiguous; the step's own
        value_cache  [num_blocks, block_size, Hkv, Dv]       keys are in it already. Dv may differ from D

H is a multiple of Hkv. Softmax and sums are float32 whatever the dtype. Only blocks with a visible position are read.

With caches of float8, GPUs multiply half-precision queries as float16: numbers of theirs beyond its range, 65,504,
become infinite.

On CPUs all slots of a sequence's blocks must hold finite numbers, those past its end too: they are multiplied by zero,
not left out (see `KVCache.clear_blocks`). On GPUs slots past the end are not read. What may be captured in a graph
there is said at `AttentionMetadata`.

    write_kv(key, value, key_cache, value_cache, slot_mapping)      in place

        key [T, Hkv, D], value [T, Hkv, Dv]: each head contiguous; dtype of the caches, or theirs is float8_e4m3fn
        slot_mapping [T] int64: block number * block_size + offset, all distinct; -1: the row is not kept

Numbers beyond the range of float8_e4m3fn become its largest, 448; NaN stays NaN.

Source: PagedAttention, Kwon et al., arXiv 2309.06180, section 4.1; on GPUs the running softmax of FlashAttention-2,
arXiv 2307.08691, section 3.1, and the splits of the context of Flash-Decoding, Dao et al., 2023.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model_worker.engine.ops.paged_attention.metadata import AttentionMetadata, AttentionParams
from model_worker.engine.ops.paged_attention.reference import paged_attention_reference, write_kv_reference
from model_worker.engine.ops.paged_attention.torch_cpu import paged_attention_cpu


def paged_attention(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, metadata: AttentionMetadata, params: AttentionParams
) -> Tensor:
    """See the module's docstring. -> [T, H, Dv]

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    num_tokens, num_heads, key_dim = query.shape
    if key_cache.shape[3] != key_dim or key_cache.shape[:3] != value_cache.shape[:3]:
        raise ValueError(f"query {list(query.shape)} does not fit {list(key_cache.shape)}, {list(value_cache.shape)}")
    if num_heads % key_cache.shape[2]:
        raise ValueError(f"{num_heads} query heads cannot share {key_cache.shape[2]} KV heads")
    if key_cache.dtype != value_cache.dtype or key_cache.dtype not in (query.dtype, torch.float8_e4m3fn):
        raise ValueError(f"dtypes differ: {query.dtype}, {key_cache.dtype}, {value_cache.dtype}")
    if metadata.query_start[-1] != num_tokens:
        raise ValueError(f"the metadata describes {metadata.query_start[-1]} tokens, the query has {num_tokens}")
    if query.device.type == "cpu" and key_cache.dtype == query.dtype:
        return paged_attention_cpu(query, key_cache, value_cache, metadata, params)
    if query.device.type == "cuda":
        from model_worker.engine.ops.paged_attention import triton  # not installed where there is no GPU

        return triton.paged_attention(query, key_cache, value_cache, metadata, params)
    return paged_attention_reference(query, key_cache, value_cache, metadata, params)


def write_kv(key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor) -> None:
    """See the module's docstring."""
    if key.device.type == "cuda":
        from model_worker.engine.ops.paged_attention import triton  # not installed where there is no GPU

        triton.write_kv(key, value, key_cache, value_cache, slot_mapping)
    else:
        write_kv_reference(key, value, key_cache, value_cache, slot_mapping)

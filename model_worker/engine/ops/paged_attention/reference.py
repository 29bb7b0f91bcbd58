"""Paged attention as its formula says, one sequence after the other, and writing: readable, not fast."""

from __future__ import annotations

import torch
from torch import Tensor

from model_worker.engine.ops.paged_attention.metadata import AttentionMetadata, AttentionParams

_LARGEST_FLOAT8 = torch.finfo(torch.float8_e4m3fn).max


def paged_attention_reference(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, metadata: AttentionMetadata, params: AttentionParams
) -> Tensor:
    """See functional.py. -> [T, H, Dv]"""
    num_heads, num_kv_heads = query.shape[1], key_cache.shape[2]
    outputs = []
    for sequence, seq_len in enumerate(metadata.seq_lens):
        rows = slice(metadata.query_start[sequence], metadata.query_start[sequence + 1])
        q = query[rows].float()  # [n, H, D]
        num_blocks = -(-seq_len // key_cache.shape[1])
        blocks = metadata.block_tables[sequence, :num_blocks].long()
        k = _bytes(key_cache)[blocks].view(key_cache.dtype).flatten(0, 1)[:seq_len].float()  # [L, Hkv, D]
        v = _bytes(value_cache)[blocks].view(value_cache.dtype).flatten(0, 1)[:seq_len].float()  # [L, Hkv, Dv]
        k = k.repeat_interleave(num_heads // num_kv_heads, dim=1)  # [L, H, D]
        v = v.repeat_interleave(num_heads // num_kv_heads, dim=1)  # [L, H, Dv]
        scores = torch.einsum("nhd,lhd->hnl", q, k) * params.scale
        if params.softcap is not None:
            scores = params.softcap * torch.tanh(scores / params.softcap)
        key_positions = torch.arange(seq_len, device=query.device)
        if params.alibi is not None:
            scores = scores + params.alibi.bias(key_positions)[:, None, :]
        scores = scores.masked_fill(~_visible(metadata.positions[rows], key_positions, params), -torch.inf)
        if params.sinks is not None:
            sinks = params.sinks.float()[:, None, None].expand(-1, len(q), 1)  # [H, n, 1]
            weights = torch.cat((scores, sinks), dim=2).softmax(dim=2)[:, :, :-1]
        else:
            weights = scores.softmax(dim=2)  # [H, n, L]
        outputs.append(torch.einsum("hnl,lhd->nhd", weights, v))
    return torch.cat(outputs).to(query.dtype)


def write_kv_reference(
    key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor
) -> None:
    """See functional.py."""
    kept = slot_mapping >= 0
    if not kept.all():
        key, value, slot_mapping = key[kept], value[kept], slot_mapping[kept]
    for new, cache in ((key, key_cache), (value, value_cache)):
        if cache.dtype != new.dtype:
            new = new.float().clamp(-_LARGEST_FLOAT8, _LARGEST_FLOAT8).to(cache.dtype)
        _bytes(cache).flatten(0, 1).index_copy_(0, slot_mapping, _bytes(new))


def _bytes(tensor: Tensor) -> Tensor:
    """The same memory in a type that torch can index: it has no such operators for 8-bit floats everywhere."""
    return tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor


def _visible(query_positions: Tensor, key_positions: Tensor, params: AttentionParams) -> Tensor:
    """Whether the query at position [n] sees the key at position [L]. -> [n, L] bool"""
    p, j = query_positions[:, None], key_positions[None, :]
    visible = j <= p
    if params.sliding_window is not None:
        visible &= j > p - params.sliding_window
    if params.chunk_size is not None:
        visible &= j // params.chunk_size == p // params.chunk_size
    return visible

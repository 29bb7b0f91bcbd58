"""Paged attention from torch's own operators, for CPUs.

Sequences with one query token (decoding) are batched: sorted by the number of blocks that they read and cut into
groups of similar length, each of which is one gather of blocks and one attention with the query heads of a KV head as
its rows. Sequences with more (prompts, or chunks of them) are done one by one. Blocks before the first visible
position are not read.

    group of B sequences:   blocks [B * N]  --index_select-->  keys [B, N * block_size, Hkv, D]
                            query  [B, H, D]  seen as  [B, Hkv, H // Hkv, D]

Index tensors and masks depend on the batch and on which positions a layer sees, not on the layer: they are made once a
step and kept in `AttentionMetadata.plans`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from model_worker.engine.ops.paged_attention.metadata import AttentionMetadata, AttentionParams

_MAX_PADDING = 1.25  # the longest sequence of a group reads at most this many times the blocks of the shortest,
_SMALL_NUM_BLOCKS = 4  # or at most this many blocks more


@dataclass(frozen=True, slots=True, eq=False)
class _Group:
    """Decoding sequences that are computed together.

    Attributes:
        rows: [B] int64 tokens of the batch; None: tokens 0 ... B - 1 in this order.
        blocks: [B * N] int32, the blocks each one reads; short ones are padded with their own first block.
        mask: [B, 1 or H, 1, L] additive; L = N * block_size. See `_finish_mask` for its dtype.
    """

    num_sequences: int
    rows: Tensor | None
    blocks: Tensor
    mask: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class _Chunk:
    """One sequence with several query tokens: a prompt or a part of it.

    Attributes:
        rows: its tokens of the batch.
        blocks: [N] int32.
        num_keys: L, positions read; those after them in the last block are cut off.
        mask: [1 or H, n, L] additive; None: plainly causal and n = L. See `_finish_mask` for its dtype.
    """

    rows: slice
    blocks: Tensor
    num_keys: int
    mask: Tensor | None


@dataclass(frozen=True, slots=True)
class _Plan:
    groups: tuple[_Group, ...]
    chunks: tuple[_Chunk, ...]


def paged_attention_cpu(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, metadata: AttentionMetadata, params: AttentionParams
) -> Tensor:
    """See functional.py. -> [T, H, Dv]"""
    key = (params.sliding_window, params.chunk_size, id(params.alibi), _written_out(params), query.dtype)
    plan: _Plan | None = metadata.plans.get(key)
    if plan is None:
        plan = metadata.plans[key] = _make_plan(metadata, params, key_cache.shape[1], query.dtype)
    if not plan.chunks and len(plan.groups) == 1 and plan.groups[0].rows is None:
        return _decode(query, plan.groups[0], key_cache, value_cache, params)
    out = query.new_empty(query.shape[0], query.shape[1], value_cache.shape[3])
    for group in plan.groups:
        if group.rows is None:
            out[: group.num_sequences] = _decode(query[: group.num_sequences], group, key_cache, value_cache, params)
        else:
            out.index_copy_(
                0, group.rows, _decode(query.index_select(0, group.rows), group, key_cache, value_cache, params)
            )
    for chunk in plan.chunks:
        out[chunk.rows] = _extend(query[chunk.rows], chunk, key_cache, value_cache, params)
    return out


def _decode(query: Tensor, group: _Group, key_cache: Tensor, value_cache: Tensor, params: AttentionParams) -> Tensor:
    """One token of each sequence of a group: query [B, H, D] -> [B, H, Dv]"""
    num_sequences, num_heads, key_dim = query.shape
    block_size, num_kv_heads = key_cache.shape[1:3]
    num_keys = len(group.blocks) // num_sequences * block_size
    k = key_cache.index_select(0, group.blocks).view(num_sequences, num_keys, num_kv_heads, key_dim).transpose(1, 2)
    v = value_cache.index_select(0, group.blocks).view(num_sequences, num_keys, num_kv_heads, -1).transpose(1, 2)
    num_shared = num_heads // num_kv_heads
    # [B, 1 or H, 1, L] -> [B, 1 or Hkv, 1 or num_shared, L]
    mask = group.mask if group.mask.shape[1] == 1 else group.mask.view(-1, num_kv_heads, num_shared, num_keys)
    q = query.reshape(num_sequences, num_kv_heads, num_shared, key_dim)
    if _written_out(params):
        sinks = None if params.sinks is None else params.sinks.view(1, num_kv_heads, num_shared, 1)
        out = _attention(q, k, v, mask, sinks, params)
    else:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=params.scale)
    return out.reshape(num_sequences, num_heads, -1)


def _extend(query: Tensor, chunk: _Chunk, key_cache: Tensor, value_cache: Tensor, params: AttentionParams) -> Tensor:
    """Several tokens of one sequence: query [n, H, D] -> [n, H, Dv]"""
    num_heads, num_kv_heads = query.shape[1], key_cache.shape[2]
    k = key_cache.index_select(0, chunk.blocks).flatten(0, 1)[: chunk.num_keys].transpose(0, 1)  # [Hkv, L, D]
    v = value_cache.index_select(0, chunk.blocks).flatten(0, 1)[: chunk.num_keys].transpose(0, 1)  # [Hkv, L, Dv]
    q = query.transpose(0, 1)  # [H, n, D]
    if not _written_out(params):
        out = F.scaled_dot_product_attention(
            q[None],
            k[None],
            v[None],
            attn_mask=None if chunk.mask is None else chunk.mask[None],
            is_causal=chunk.mask is None,
            scale=params.scale,
            enable_gqa=num_heads != num_kv_heads,
        )[0]
        return out.transpose(0, 1)
    num_shared = num_heads // num_kv_heads
    mask = chunk.mask
    assert mask is not None
    if mask.shape[0] != 1:
        mask = mask.view(num_kv_heads, num_shared, *mask.shape[1:])
    sinks = None if params.sinks is None else params.sinks.view(num_kv_heads, num_shared, 1, 1)
    out = _attention(q.reshape(num_kv_heads, num_shared, *q.shape[1:]), k[:, None], v[:, None], mask, sinks, params)
    return out.flatten(0, 1).transpose(0, 1)


def _written_out(params: AttentionParams) -> bool:
    """Whether the fused operator lacks something that the layer needs."""
    return params.softcap is not None or params.sinks is not None


def _attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, sinks: Tensor | None, params: AttentionParams
) -> Tensor:
    """Attention step by step, for what the fused operator does not know: softcap and sinks.

    Args:
        query: [..., n, D], key [..., L, D], value [..., L, Dv]; leading dimensions broadcast.
        mask: additive, broadcasts to [..., n, L]; sinks: broadcasts to [..., n, 1].
    """
    scores = torch.matmul(query, key.transpose(-1, -2)).float().mul_(params.scale)  # [..., n, L]
    if params.softcap is not None:
        scores = scores.div_(params.softcap).tanh_().mul_(params.softcap)
    scores += mask
    if sinks is None:
        weights = scores.softmax(dim=-1)
    else:
        sinks = sinks.float()
        peak = torch.maximum(scores.amax(dim=-1, keepdim=True), sinks)
        weights = scores.sub_(peak).exp_()
        weights = weights / (weights.sum(dim=-1, keepdim=True) + (sinks - peak).exp())
    return torch.matmul(weights.to(value.dtype), value)


def _make_plan(metadata: AttentionMetadata, params: AttentionParams, block_size: int, dtype: torch.dtype) -> _Plan:
    decoding = [s for s in range(metadata.num_sequences) if metadata.query_len(s) == 1]
    first_blocks = {s: params.first_visible(metadata.seq_lens[s] - 1) // block_size for s in decoding}
    num_blocks = {s: (metadata.seq_lens[s] - 1) // block_size + 1 - first_blocks[s] for s in decoding}
    groups = [
        _make_group(metadata, params, members, first_blocks, num_blocks, block_size, dtype)
        for members in _similar(decoding, num_blocks)
    ]
    chunks = [
        _make_chunk(metadata, params, s, block_size, dtype)
        for s in range(metadata.num_sequences)
        if metadata.query_len(s) > 1
    ]
    return _Plan(tuple(groups), tuple(chunks))


def _similar(sequences: list[int], num_blocks: dict[int, int]) -> list[list[int]]:
    """Cut sequences into groups within the padding bounds; the order inside a group is that of the batch."""
    groups: list[list[int]] = []
    most = 0
    for sequence in sorted(sequences, key=lambda s: -num_blocks[s]):
        fits = num_blocks[sequence] + _SMALL_NUM_BLOCKS >= most or num_blocks[sequence] * _MAX_PADDING >= most
        if groups and fits:
            groups[-1].append(sequence)
        else:
            groups.append([sequence])
            most = num_blocks[sequence]
    return [sorted(group) for group in groups]


def _make_group(
    metadata: AttentionMetadata,
    params: AttentionParams,
    members: list[int],
    first_blocks: dict[int, int],
    num_blocks: dict[int, int],
    block_size: int,
    dtype: torch.dtype,
) -> _Group:
    device = metadata.positions.device
    most = max(num_blocks[s] for s in members)
    first = torch.tensor([first_blocks[s] for s in members], device=device)[:, None]  # [B, 1]
    count = torch.tensor([num_blocks[s] for s in members], device=device)[:, None]
    offsets = torch.arange(most, device=device)
    columns = first + torch.where(offsets < count, offsets, 0)  # [B, N]
    tables = metadata.block_tables
    if len(members) != len(tables):
        tables = tables[torch.tensor(members, device=device)]
    blocks = tables.gather(1, columns)  # [B, N]
    last = torch.tensor([metadata.seq_lens[s] - 1 for s in members], device=device)[:, None]
    lowest = torch.tensor([params.first_visible(metadata.seq_lens[s] - 1) for s in members], device=device)[:, None]
    positions = first * block_size + torch.arange(most * block_size, device=device)  # [B, L]
    hidden = (positions < lowest) | (positions > last)
    mask = torch.zeros(positions.shape, device=device).masked_fill_(hidden, -torch.inf)[:, None, None, :]
    if params.alibi is not None:
        bias = torch.stack([params.alibi.bias(row) for row in positions])  # [B, H, L]
        own_bias = torch.stack([params.alibi.bias(row) for row in last])  # [B, H, 1]
        mask = _add_bias(mask, bias[:, :, None, :], own_bias[:, :, None, :], params)
    rows = [metadata.query_start[s] for s in members]
    in_order = rows == list(range(len(rows)))
    return _Group(
        num_sequences=len(members),
        rows=None if in_order else torch.tensor(rows, device=device),
        blocks=blocks.flatten(),
        mask=_finish_mask(mask, params, dtype),
    )


def _make_chunk(
    metadata: AttentionMetadata, params: AttentionParams, sequence: int, block_size: int, dtype: torch.dtype
) -> _Chunk:
    device = metadata.positions.device
    rows = slice(metadata.query_start[sequence], metadata.query_start[sequence + 1])
    seq_len = metadata.seq_lens[sequence]
    num_queries = rows.stop - rows.start
    # Visibility only moves forward: what the first query does not see, no later one sees.
    first_block = params.first_visible(seq_len - num_queries) // block_size
    first = first_block * block_size
    blocks = metadata.block_tables[sequence, first_block : (seq_len - 1) // block_size + 1]
    sees_all = params.first_visible(seq_len - 1) == 0 and params.alibi is None
    if sees_all and num_queries == seq_len and not _written_out(params):
        return _Chunk(rows, blocks, seq_len, None)
    p = torch.arange(seq_len - num_queries, seq_len, device=device)[:, None]  # [n, 1]
    j = torch.arange(first, seq_len, device=device)  # [L]
    hidden = j > p
    if params.sliding_window is not None:
        hidden |= j <= p - params.sliding_window
    if params.chunk_size is not None:
        hidden |= j < p - p % params.chunk_size
    mask = torch.zeros(hidden.shape, device=device).masked_fill_(hidden, -torch.inf)[None]  # [1, n, L]
    if params.alibi is not None:
        bias, own_bias = params.alibi.bias(j), params.alibi.bias(p.squeeze(1))  # [H, L], [H, n]
        mask = _add_bias(mask, bias[:, None, :], own_bias[:, :, None], params)  # [H, n, L]
    return _Chunk(rows, blocks, seq_len - first, _finish_mask(mask, params, dtype))


def _add_bias(mask: Tensor, bias: Tensor, own_bias: Tensor, params: AttentionParams) -> Tensor:
    """Add position biases to a mask, for the fused operator less the bias of the query's own position.

    That shifts all scores of a row alike, which changes nothing, and makes the biases of the nearest keys, which matter
    most, the smallest: in half precision those of far positions would be rounded to steps larger than one slope. Where
    attention is written out the mask is float32, and a row may have a sink, whose score must not be shifted against.
    """
    return bias + mask if _written_out(params) else (bias - own_bias) + mask


def _finish_mask(mask: Tensor, params: AttentionParams, dtype: torch.dtype) -> Tensor:
    """The fused operator wants the dtype of the query; written-out attention adds to float32 scores."""
    return mask if _written_out(params) else mask.to(dtype)

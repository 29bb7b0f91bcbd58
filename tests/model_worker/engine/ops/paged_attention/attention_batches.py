"""Batches of sequences over shuffled blocks, and the comparison of an attention with the readable one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from model_worker.engine.ops.paged_attention import Alibi, AttentionMetadata, AttentionParams
from model_worker.engine.ops.paged_attention.reference import paged_attention_reference

Attention = Callable[[Tensor, Tensor, Tensor, AttentionMetadata, AttentionParams], Tensor]
CPU = torch.device("cpu")
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


def batch(
    lengths: list[tuple[int, int]], block_size: int, device: torch.device = CPU, num_spare: int = 3
) -> tuple[AttentionMetadata, int]:
    """Sequences (tokens before, tokens in the batch), and the number of blocks. Block tables end in wrong entries."""
    num_blocks = [-(-(before + new) // block_size) for before, new in lengths]
    total = sum(num_blocks) + num_spare
    free = torch.randperm(total).tolist()
    tables = torch.full((len(lengths), max(num_blocks) + 1), 2**30, dtype=torch.int32)
    for row, num in enumerate(num_blocks):
        tables[row, :num] = torch.tensor([free.pop() for _ in range(num)])
    query_start = [0]
    for _, new in lengths:
        query_start.append(query_start[-1] + new)
    positions = torch.cat([torch.arange(before, before + new) for before, new in lengths])
    seq_lens = tuple(before + new for before, new in lengths)
    return AttentionMetadata(tables.to(device), tuple(query_start), seq_lens, positions.to(device)), total


@dataclass(frozen=True)
class Case:
    """What is computed. `options` are those of `AttentionParams`; "sinks" is a bool, "alibi" the dtype of slopes."""

    lengths: list[tuple[int, int]]
    block_size: int = 8
    heads: tuple[int, int] = (4, 2)
    dims: tuple[int, int] = (16, 16)
    dtype: torch.dtype = torch.float32
    kv_dtype: torch.dtype | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def params(self, device: torch.device = CPU) -> AttentionParams:
        options = dict(self.options)
        num_heads = self.heads[0]
        if options.get("sinks"):
            options["sinks"] = torch.randn(num_heads, device=device)
        if dtype := options.pop("alibi", None):
            options["alibi"] = Alibi(torch.rand(num_heads, device=device).to(dtype), 0.5)
        return AttentionParams(scale=0.3, **options)


def compare(attention: Attention, case: Case, device: torch.device = CPU) -> None:
    """Slots that no sequence sees hold NaN: an attention for GPUs must not read them."""
    metadata, num_blocks = batch(case.lengths, case.block_size, device)
    (num_heads, num_kv_heads), (key_dim, value_dim) = case.heads, case.dims
    lead = (num_blocks, case.block_size, num_kv_heads)
    key_cache, value_cache = torch.randn(*lead, key_dim), torch.randn(*lead, value_dim)
    expected_key, expected_value = key_cache.clone(), value_cache.clone()
    seen = _seen(metadata, case, num_blocks)
    key_cache[~seen], value_cache[~seen] = torch.nan, torch.nan
    query = torch.randn(metadata.query_start[-1], num_heads, key_dim).to(case.dtype)
    caches, expected_caches = (
        [cache.to(device, case.kv_dtype or case.dtype) for cache in pair]
        for pair in ((key_cache, value_cache), (expected_key, expected_value))
    )
    params = case.params(device)
    out = attention(query.to(device), *caches, metadata, params)
    valid = replace(metadata, block_tables=metadata.block_tables.clamp(max=num_blocks - 1), plans={})
    expected = paged_attention_reference(query.to(device), *expected_caches, valid, params)
    assert out.shape == (len(query), num_heads, value_dim)
    assert out.dtype == case.dtype
    tolerance = TOLERANCE[case.dtype]
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)


def _seen(metadata: AttentionMetadata, case: Case, num_blocks: int) -> Tensor:
    """Slots that some token sees. -> [num_blocks, block_size] bool"""
    seen = torch.zeros(num_blocks * case.block_size, dtype=torch.bool)
    visibility = AttentionParams(
        scale=1.0, sliding_window=case.options.get("sliding_window"), chunk_size=case.options.get("chunk_size")
    )
    for sequence, (before, new) in enumerate(case.lengths):
        positions = torch.arange(visibility.first_visible(before), before + new)
        blocks = metadata.block_tables[sequence].cpu().long()[positions // case.block_size]
        seen[blocks * case.block_size + positions % case.block_size] = True
    return seen.view(num_blocks, case.block_size)

"""Paged attention alone, against the bandwidth of the GPU's memory (decoding) and its rate of products (prompts).

    python benchmarks/gpu_attention.py --json FILE

Shapes of an 8B Llama 3.1: 32 query heads, 8 KV heads of 128 numbers, blocks of 16 tokens in random order.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from gpu_ceilings import Ceilings, measure_ceilings, median_s, replayed_s
from gpu_checkpoint import DEVICE
from gpu_figures import Figure, Findings

from model_worker.engine.ops.paged_attention import AttentionMetadata, AttentionParams, paged_attention

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE = 32, 8, 128, 16
DECODES = ((1, 1024), (1, 8192), (32, 1024), (128, 1024))
TARGET_SHAPE, TARGET = (64, 8192), 0.85
PROMPT_TOKENS = 8192
UNCACHED_BYTES = 256 << 20


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, help="where the figures are written, after each one")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    ceilings = measure_ceilings()
    findings = Findings(options.json)
    findings.add(decode(*TARGET_SHAPE, torch.bfloat16, ceilings))
    for shape in DECODES:
        findings.add(decode(*shape, torch.bfloat16, ceilings))
    findings.add(decode(*TARGET_SHAPE, torch.float8_e4m3fn, ceilings))
    findings.add(prefill(ceilings))
    print(findings.table())
    return 0


def decode(num_sequences: int, context: int, kv_dtype: torch.dtype, ceilings: Ceilings) -> Figure:
    """One token of each of some sequences of equal length, in a graph."""
    num_bytes = 2 * num_sequences * context * NUM_KV_HEADS * HEAD_DIM * kv_dtype.itemsize
    # Layers, each with a cache of its own, as many as the GPU's cache cannot hold.
    layers = [_batch(num_sequences, context, 1, kv_dtype) for _ in range(-(-UNCACHED_BYTES // num_bytes))]
    query = torch.randn(num_sequences, NUM_HEADS, HEAD_DIM, device=DEVICE, dtype=torch.bfloat16)
    params = AttentionParams(scale=HEAD_DIM**-0.5)

    def run() -> None:
        for metadata, key_cache, value_cache in layers:
            paged_attention(query, key_cache, value_cache, metadata, params)

    seconds = replayed_s(run) / len(layers)
    share = num_bytes / seconds / ceilings.copy_bytes_s
    is_target = (num_sequences, context) == TARGET_SHAPE and kv_dtype == torch.bfloat16
    return Figure(
        f"attention, decode, batch {num_sequences}, context {context:,}{'' if kv_dtype.itemsize == 2 else ', fp8'}",
        share,
        "of copy bandwidth",
        TARGET if is_target else None,
        f"{seconds * 1e6:,.0f} us, {num_bytes / seconds / 1e9:,.0f} of {ceilings.copy_bytes_s / 1e9:,.0f} GB/s",
    )


def prefill(ceilings: Ceilings) -> Figure:
    """One prompt."""
    metadata, key_cache, value_cache = _batch(1, PROMPT_TOKENS, PROMPT_TOKENS, torch.bfloat16)
    query = torch.randn(PROMPT_TOKENS, NUM_HEADS, HEAD_DIM, device=DEVICE, dtype=torch.bfloat16)
    params = AttentionParams(scale=HEAD_DIM**-0.5)
    seconds = median_s(lambda: paged_attention(query, key_cache, value_cache, metadata, params))
    flops = 2 * PROMPT_TOKENS * (PROMPT_TOKENS + 1) * NUM_HEADS * HEAD_DIM  # of the visible half
    return Figure(
        f"attention, prompt of {PROMPT_TOKENS:,} tokens",
        flops / seconds / ceilings.bf16_flops,
        "of the matmul rate",
        None,
        f"{seconds * 1e3:.2f} ms, {flops / seconds / 1e12:,.0f} of {ceilings.bf16_flops / 1e12:,.0f} TFLOP/s",
    )


def _batch(
    num_sequences: int, context: int, query_len: int, kv_dtype: torch.dtype
) -> tuple[AttentionMetadata, torch.Tensor, torch.Tensor]:
    """Sequences of `context` tokens, the last `query_len` of which are computed, and caches of random numbers."""
    num_blocks = -(-context // BLOCK_SIZE)
    tables = torch.randperm(num_sequences * num_blocks, device=DEVICE, dtype=torch.int32).view(num_sequences, -1)
    metadata = AttentionMetadata(
        block_tables=tables,
        query_start=tuple(range(0, num_sequences * query_len + 1, query_len)),
        seq_lens=(context,) * num_sequences,
        positions=torch.arange(context - query_len, context, device=DEVICE).repeat(num_sequences),
        device_seq_lens=torch.full((num_sequences,), context, dtype=torch.int32, device=DEVICE),
    )
    lead = (num_sequences * num_blocks, BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM)
    key_cache, value_cache = (torch.randn(lead, device=DEVICE, dtype=torch.bfloat16).to(kv_dtype) for _ in range(2))
    return metadata, key_cache, value_cache


if __name__ == "__main__":
    sys.exit(main())

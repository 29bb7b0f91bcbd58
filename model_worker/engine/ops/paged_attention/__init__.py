"""Attention of a flat batch over a paged KV cache, and writing to that cache; `functional.py` has the contract.

`reference.py` is the definition. On CPUs `torch_cpu.py` is the fast version, on GPUs `triton.py`. The native decoder
computes the same formula over a cache of its own: `operation.py`, `native_kv.py`.
"""

from model_worker.engine.ops.paged_attention.functional import paged_attention, write_kv
from model_worker.engine.ops.paged_attention.metadata import Alibi, AttentionMetadata, AttentionParams

__all__ = ["Alibi", "AttentionMetadata", "AttentionParams", "paged_attention", "write_kv"]

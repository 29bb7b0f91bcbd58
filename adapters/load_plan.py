"""What a model adapter decides about a checkpoint before a single weight is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapters.chat_template import ChatTemplate
from registry.checkpoint import Checkpoint
from registry.families import ModelFamily


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Bytes that serving needs, before it is tried."""

    weights_bytes: int
    kv_bytes_per_token: int
    activations_bytes: int  # of one step of max_num_batched_tokens


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """How to load one model; made by `adapters.plan_load`, carried out by `model_worker.engine.loader`.

    Attributes:
        path: the checkpoint directory, or the single GGUF file.
        family: the model family chosen by model_type and architectures.
        checkpoint: its files and tensor headers (no data).
        config: the Hugging Face config as a dict with `model_type`; for GGUF derived from the file's metadata.
        dtype: float32, bfloat16 or float16: that of weights and KV cache in memory.
        quantization: "int8", "int4" or "fp8": what the matrices are rounded to while loading; None: not rounded.
        deltas: delta artifacts to add to the weights while they are read, in this order.
        tokenizer_path: directory with tokenizer files, or the GGUF file.
        chat_template: how a conversation becomes a prompt; None: the model has no template and chat is refused.
        stop_token_ids: ids that end a sequence.
        max_model_len: most tokens of prompt and output together.
        memory: estimate shown to the operator and checked against the machine.
        vocab_size: rows of the embedding; ids from here on cannot be asked for.
        kept_types: GGUF types whose blocks stay as the file has them, by whoever can compute with them.
    """

    path: Path
    family: ModelFamily
    checkpoint: Checkpoint
    config: Mapping[str, Any]
    dtype: str
    quantization: str | None
    deltas: tuple[Path, ...]
    tokenizer_path: Path
    chat_template: ChatTemplate | None
    stop_token_ids: tuple[int, ...]
    max_model_len: int
    memory: MemoryEstimate
    vocab_size: int
    kept_types: frozenset[str] = frozenset()

"""Making a LoadPlan: choose the model adapter, decide what is open, check everything that can be checked."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from adapters.chat_format import choose_chat_template, special_tokens, stop_token_ids
from adapters.checks import (
    check_deltas,
    check_memory,
    check_stored_types,
    check_tokenizer_files,
    check_vocabulary,
    resolve_max_model_len,
)
from adapters.dtype import resolve_dtype, stored_dtype
from adapters.gguf import config_from_gguf
from adapters.load_plan import LoadPlan
from adapters.memory import available_memory_bytes, estimate_memory
from adapters.model_adapter import find_model_adapter
from adapters.quantization import resolve_precision
from adapters.tokenizer import load_tokenizer
from registry.checkpoint import Checkpoint, read_checkpoint
from registry.checkpoint_file import read_json_file


def plan_load(
    path: Path | str,
    *,
    dtype: str = "auto",
    quantization: str = "auto",
    chat_template: str | None = None,
    max_model_len: int | None = None,
    deltas: Sequence[Path] = (),
    memory_bytes: int | None = None,
    max_num_batched_tokens: int = 512,
    native_bf16: bool | None = None,
    native_model_types: Collection[str] = (),
) -> LoadPlan:
    """Decide how to load the checkpoint at `path`, without reading its weights.

    Args:
        path: checkpoint directory or `.gguf` file.
        dtype: "auto", "float32", "bfloat16" or "float16".
        quantization: "auto", "none", "int8", "int4" or "fp8" (adapters/quantization.py).
        chat_template: name of a library template or a file; None: the model's own.
        max_model_len: most tokens of prompt and output together; None: as many as the model can do.
        deltas: delta artifacts to add to the weights while they are read.
        memory_bytes: memory that may be used; None: what this machine has free.
        max_num_batched_tokens: tokens of one step, for the estimate of the activations.
        native_bf16: whether the device multiplies bfloat16 in hardware; None: ask this CPU.
        native_model_types: model types that will be computed by code that is fast with half-precision weights on
            every machine and computes with quantized weights.

    Raises:
        CheckpointError: files missing, truncated or contradicting each other.
        UnsupportedModelError: a model, format or setting that is known not to be served exactly.
        InsufficientMemoryError: it would not fit.
        InvalidRequestError: a value of the arguments that is not possible for this model.
    """
    path = Path(path)
    checkpoint = read_checkpoint(path)
    config = _read_config(checkpoint)
    adapter = find_model_adapter(config)
    check_stored_types(checkpoint, config)
    check_deltas(deltas)
    length = resolve_max_model_len(adapter, config, max_model_len)
    stored = stored_dtype(checkpoint, config)
    is_native = config["model_type"] in native_model_types
    chosen_dtype = resolve_dtype(dtype, stored, native_bf16=True if is_native else native_bf16)
    precision = resolve_precision(quantization, checkpoint, is_native=is_native, has_deltas=bool(deltas))
    memory = estimate_memory(
        checkpoint,
        adapter,
        dtype=chosen_dtype,
        stored_dtype=stored,
        max_num_batched_tokens=max_num_batched_tokens,
        precision=precision,
    )
    check_memory(
        memory,
        max_model_len=length,
        max_num_batched_tokens=max_num_batched_tokens,
        dtype=chosen_dtype,
        quantization=precision.quantization,
        available_bytes=available_memory_bytes() if memory_bytes is None else memory_bytes,
    )
    check_tokenizer_files(checkpoint)
    tokenizer_path = checkpoint.files[0] if checkpoint.format == "gguf" else path
    tokenizer = load_tokenizer(tokenizer_path)
    check_vocabulary(checkpoint, tokenizer, adapter.vocab_size)
    template = choose_chat_template(checkpoint, chat_template, special_tokens(checkpoint, tokenizer))
    return LoadPlan(
        path=path,
        family=adapter.family,
        checkpoint=checkpoint,
        config=config,
        dtype=chosen_dtype,
        quantization=precision.quantization,
        deltas=tuple(deltas),
        tokenizer_path=tokenizer_path,
        chat_template=template,
        stop_token_ids=stop_token_ids(checkpoint, config, tokenizer, template),
        max_model_len=length,
        memory=memory,
        vocab_size=adapter.vocab_size,
        kept_types=precision.kept_types,
    )


def _read_config(checkpoint: Checkpoint) -> Mapping[str, Any]:
    if checkpoint.format == "gguf":
        return config_from_gguf(checkpoint)
    return read_json_file(checkpoint.path / "config.json")

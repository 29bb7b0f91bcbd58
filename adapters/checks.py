"""What is checked before a weight is read. Every function raises an error that says what to do, or returns."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from adapters.load_plan import MemoryEstimate
from adapters.memory import gib
from adapters.model_adapter import ModelAdapter
from adapters.tokenizer import Tokenizer
from registry.checkpoint import Checkpoint
from registry.errors import CheckpointError, InsufficientMemoryError, InvalidRequestError, UnsupportedModelError
from registry.ggml_types import SUPPORTED_GGML_TYPES
from registry.parameter_names import is_input_embedding

_FLOAT_TYPES = frozenset(("F64", "F32", "F16", "BF16"))
_INDEX_TYPES = frozenset(("I64", "I32", "I16", "U8", "BOOL"))  # buffers such as attention masks of old checkpoints
# Frequencies that depend on the token's own position only; the batch's neighbours cannot change them.
_ROPE_TYPES = frozenset((None, "default", "linear", "llama3", "yarn", "proportional"))
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model")

log = logging.getLogger(__name__)


def check_stored_types(checkpoint: Checkpoint, config: Mapping[str, Any]) -> None:
    """The weights are stored in a form that is read exactly.

    Raises: UnsupportedModelError naming the format or the types that are not.
    """
    quantization = config.get("quantization_config", config.get("compression_config"))
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, Mapping) else None
        raise UnsupportedModelError(
            f"the checkpoint is quantized with {method or 'an unnamed method'}, which is not supported; "
            "use the model's unquantized release or a GGUF file of it"
        )
    known = SUPPORTED_GGML_TYPES if checkpoint.format == "gguf" else _FLOAT_TYPES | _INDEX_TYPES
    unknown = sorted({tensor.dtype for tensor in checkpoint.tensors.values()} - known)
    if unknown:
        example = next(tensor for tensor in checkpoint.tensors.values() if tensor.dtype == unknown[0])
        served = SUPPORTED_GGML_TYPES if checkpoint.format == "gguf" else _FLOAT_TYPES
        raise UnsupportedModelError(
            f"the checkpoint holds tensors of type {', '.join(unknown)} (for example {example.name}), which is not "
            f"supported; use a release of the model in {', '.join(sorted(served))}"
        )


def check_tokenizer_files(checkpoint: Checkpoint) -> None:
    """Tokenizer files lie beside the weights (a GGUF file holds its own).

    Raises: CheckpointError when there are none.
    """
    if checkpoint.format != "gguf" and not any((checkpoint.path / name).exists() for name in _TOKENIZER_FILES):
        raise CheckpointError(
            f"{checkpoint.path} holds no tokenizer; put the tokenizer.json and tokenizer_config.json of the model there"
        )


def check_vocabulary(checkpoint: Checkpoint, tokenizer: Tokenizer, vocab_size: int) -> None:
    """The embedding has a row for every id of the tokenizer.

    Added tokens past the end are let through with a warning: some text-only releases keep markers of their multimodal
    siblings. A request whose prompt holds such an id must be refused by who takes it.

    Raises: CheckpointError for a tokenizer that belongs to another model, or a config that contradicts the weights.
    """
    for name, tensor in checkpoint.tensors.items():
        if is_input_embedding(name) and len(tensor.shape) == 2 and tensor.shape[0] != vocab_size:
            raise CheckpointError(
                f"the config says vocab_size {vocab_size}, but {name} has {tensor.shape[0]} rows; "
                "config.json and weights are of different models, download both again"
            )
    base_size = max(tokenizer.backend.get_vocab(with_added_tokens=False).values(), default=-1) + 1
    if base_size > vocab_size:
        raise CheckpointError(
            f"the tokenizer has {base_size} tokens but the model's embedding only {vocab_size} rows; "
            "it is the tokenizer of another model, put the right one beside the weights"
        )
    if tokenizer.vocab_size > vocab_size:
        first = tokenizer.token_str(vocab_size)
        log.warning(
            "the tokenizer has %d added tokens past the model's %d embedding rows, from %r on; they cannot be used",
            tokenizer.vocab_size - vocab_size,
            vocab_size,
            first,
        )


def resolve_max_model_len(adapter: ModelAdapter, config: Mapping[str, Any], requested: int | None) -> int:
    """Most tokens of prompt and output together, within what the positions of the model allow.

    Rotary frequencies must depend on nothing but a token's own position. `dynamic` ones change with the longest
    sequence of a batch, and `longrope` switches from its short to its long factors for the whole batch once any
    position passes the original context: longrope is exact, with the short factors, up to there and no further.

    Raises:
        UnsupportedModelError: rotary frequencies that depend on the batch.
        InvalidRequestError: `requested` is more than the model can do, or not positive.
    """
    longest, why = adapter.max_position_embeddings, "the model has that many positions"
    for rope in adapter.rope_parameters:
        kind = rope.get("rope_type", rope.get("type"))
        if kind == "dynamic":
            raise UnsupportedModelError(
                "the config asks for rope scaling 'dynamic', whose frequencies depend on the longest sequence in the "
                "batch, so that answers would depend on other people's requests; remove rope_scaling from config.json "
                "to serve the model's original context, or use a release with 'yarn' or 'linear' scaling"
            )
        if kind == "longrope":
            original = rope.get("original_max_position_embeddings", config.get("original_max_position_embeddings"))
            if not isinstance(original, int):
                raise CheckpointError("config.json: rope scaling 'longrope' needs original_max_position_embeddings")
            if original < longest:
                longest = original
                why = "beyond that 'longrope' changes the frequencies of every sequence in the batch"
        elif kind not in _ROPE_TYPES:
            raise UnsupportedModelError(
                f"the config asks for rope scaling {kind!r}, which is not known to be exact in a batch; "
                f"supported are longrope, {', '.join(sorted(filter(None, _ROPE_TYPES)))}"
            )
    if requested is None:
        if longest < adapter.max_position_embeddings:
            log.info("context limited to %d of %d tokens: %s", longest, adapter.max_position_embeddings, why)
        return longest
    if requested < 1:
        raise InvalidRequestError(f"max_model_len must be positive, not {requested}", param="max_model_len")
    if requested > longest:
        raise InvalidRequestError(
            f"max_model_len {requested} is more than {longest}: {why}; use --max-model-len {longest} or less",
            param="max_model_len",
        )
    return requested


def check_memory(
    memory: MemoryEstimate,
    *,
    max_model_len: int,
    max_num_batched_tokens: int,
    dtype: str,
    quantization: str | None,
    available_bytes: int,
) -> None:
    """Weights, the KV cache of one sequence of `max_model_len`, and one step's activations fit.

    Raises: InsufficientMemoryError with the whole estimate and what would fit.
    """
    kv_bytes = memory.kv_bytes_per_token * max_model_len
    needed = memory.weights_bytes + kv_bytes + memory.activations_bytes
    if needed <= available_bytes:
        return
    left = available_bytes - memory.weights_bytes - memory.activations_bytes
    remedies = []
    if left >= memory.kv_bytes_per_token:
        remedies.append(f"use --max-model-len {left // memory.kv_bytes_per_token} or less")
    if dtype == "float32":
        remedies.append("use --dtype bfloat16, which takes half")
    if quantization is None:
        remedies.append("use --quantization int8 or int4, where the model can be served so")
    remedies.append("free memory or use a larger machine")
    kept_in = dtype if quantization is None else f"{quantization} and {dtype}"
    raise InsufficientMemoryError(
        f"not enough memory: weights {gib(memory.weights_bytes)} + KV cache of one sequence of {max_model_len} tokens "
        f"{gib(kv_bytes)} + activations of {max_num_batched_tokens} tokens {gib(memory.activations_bytes)} = "
        f"{gib(needed)} in {kept_in}, available {gib(available_bytes)}; {', or '.join(remedies)}"
    )


def check_deltas(deltas: Sequence[Path]) -> None:
    """The delta artifacts exist.

    Raises: CheckpointError naming the one that does not.
    """
    for delta in deltas:
        if not delta.exists():
            raise CheckpointError(f"the delta {delta} does not exist; check the path")

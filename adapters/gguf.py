"""A GGUF file's metadata as the Hugging Face config, chat template and stop ids of its model.

Every metadata key under the architecture's prefix is either used here or refused: a key that we do not know may change
what the model computes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from adapters.gguf_architectures import GgufArchitecture, find_architecture
from registry.checkpoint import Checkpoint
from registry.errors import CheckpointError, UnsupportedModelError

# Keys that every architecture may have; what is not read below only repeats what the tensors say.
_COMMON_KEYS = frozenset(
    {"vocab_size", "context_length", "embedding_length", "block_count", "feed_forward_length", "tensor_data_layout"}
    | {"attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length"}
    | {"attention.layer_norm_epsilon", "attention.layer_norm_rms_epsilon"}
    | {"rope.dimension_count", "rope.freq_base", "rope.scale_linear"}
    | {f"rope.scaling.{key}" for key in ("type", "factor", "original_context_length", "finetuned")}
)
# Keys that may be there as long as they have the value that changes nothing.
_NEUTRAL_VALUES: Mapping[str, Any] = {
    "expert_count": 0,
    "expert_used_count": 0,
    "attention.causal": True,
    "use_parallel_residual": False,
    "attention.clamp_kqv": 0.0,
    "attention.max_alibi_bias": 0.0,
    "rope.scaling.attn_factor": 1.0,
    "rope.scaling.yarn_log_multiplier": 0.0,
}

# Ends of a turn that chat models generate, by the text of the control token.
_END_OF_TURN = frozenset({"<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<end_of_turn>"})
_CONTROL = 3

# Llama 3.1 and later: rotary frequencies are divided by `factor` below, left alone above, blended between.
_LLAMA3_LOW_FREQUENCY_FACTOR = 1.0
_LLAMA3_HIGH_FREQUENCY_FACTOR = 4.0
_LLAMA3_ORIGINAL_CONTEXT = 8192


def config_from_gguf(checkpoint: Checkpoint) -> dict[str, Any]:
    """The Hugging Face config of the model in a GGUF file.

    Raises:
        UnsupportedModelError: an architecture, or a setting in the metadata, that we do not reproduce exactly.
        CheckpointError: metadata missing or contradicting the tensors.
    """
    architecture = find_architecture(checkpoint.metadata)
    keys = _Keys(architecture.name, checkpoint.metadata)
    keys.refuse_unknown()
    config: dict[str, Any] = {
        "model_type": architecture.model_type,
        "architectures": [architecture.architecture],
        "vocab_size": _vocab_size(checkpoint),
        "tie_word_embeddings": "output.weight" not in checkpoint.tensors,
        "dtype": _stored_dtype(checkpoint),
        **_token_ids(checkpoint.metadata),
    }
    if architecture.name == "gpt2":
        return config | _gpt2_config(keys)
    return config | _llama_like_config(keys, checkpoint, architecture)


def chat_template_from_gguf(checkpoint: Checkpoint) -> str | None:
    """The Jinja source of the file's default chat template, or None."""
    template = checkpoint.metadata.get("tokenizer.chat_template")
    if template is not None and not isinstance(template, str):
        raise CheckpointError("the GGUF file's tokenizer.chat_template is not a text")
    return template or None


def stop_ids_from_gguf(checkpoint: Checkpoint) -> tuple[int, ...]:
    """Ids that end a sequence: end of text, turn or message, as the file names them or, for a chat model, by text."""
    metadata = checkpoint.metadata
    named = (f"tokenizer.ggml.{role}_token_id" for role in ("eos", "eot", "eom"))
    ids: set[int] = {metadata[key] for key in named if key in metadata}
    if chat_template_from_gguf(checkpoint) is not None:
        types = metadata.get("tokenizer.ggml.token_type", ())
        for index, token in enumerate(metadata.get("tokenizer.ggml.tokens", ())):
            if token in _END_OF_TURN and index < len(types) and types[index] == _CONTROL:
                ids.add(index)
    return tuple(sorted(ids))


@dataclass(frozen=True, slots=True)
class _Keys:
    """The metadata keys under one architecture's prefix."""

    prefix: str
    metadata: Mapping[str, Any]

    def refuse_unknown(self) -> None:
        for key, value in self.metadata.items():
            if not key.startswith(self.prefix + "."):
                continue
            name = key.removeprefix(self.prefix + ".")
            if name in _COMMON_KEYS or (name in _NEUTRAL_VALUES and value == _NEUTRAL_VALUES[name]):
                continue
            raise UnsupportedModelError(
                f"the GGUF file sets {key} = {value!r}, which is not supported; ignoring it would give wrong answers. "
                "Use the model's safetensors release"
            )

    def integer(self, name: str, default: int | None = None) -> int:
        value = self.metadata.get(f"{self.prefix}.{name}", default)
        if isinstance(value, list):
            raise UnsupportedModelError(f"the GGUF file sets {self.prefix}.{name} per layer, which is not supported")
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            raise CheckpointError(f"the GGUF file's {self.prefix}.{name} is {value!r}, not a positive number")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        value = self.metadata.get(f"{self.prefix}.{name}", default)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
            raise CheckpointError(f"the GGUF file's {self.prefix}.{name} is {value!r}, not a number")
        # Stored as float32: the shortest decimal of that float32 is what the original config said.
        return float(str(np.float32(value)))

    def get(self, name: str) -> Any:
        return self.metadata.get(f"{self.prefix}.{name}")


def _vocab_size(checkpoint: Checkpoint) -> int:
    embedding = checkpoint.tensors.get("token_embd.weight")
    if embedding is None:
        raise CheckpointError("the GGUF file has no token_embd.weight; it is not a complete model")
    return embedding.shape[0]


def _stored_dtype(checkpoint: Checkpoint) -> str:
    """The type of the matrices' numbers; bfloat16 for quantized ones."""
    kinds = {header.dtype for header in checkpoint.tensors.values() if len(header.shape) > 1}
    if kinds == {"F32"}:
        return "float32"
    return "float16" if kinds <= {"F16", "F32"} else "bfloat16"


def _token_ids(metadata: Mapping[str, Any]) -> dict[str, int | None]:
    roles = {"bos": "bos", "eos": "eos", "pad": "padding"}
    return {f"{role}_token_id": metadata.get(f"tokenizer.ggml.{name}_token_id") for role, name in roles.items()}


def _llama_like_config(keys: _Keys, checkpoint: Checkpoint, architecture: GgufArchitecture) -> dict[str, Any]:
    num_heads = keys.integer("attention.head_count")
    hidden_size = keys.integer("embedding_length")
    head_dim = keys.integer("attention.key_length", hidden_size // num_heads)
    for name in ("attention.value_length", "rope.dimension_count"):
        if keys.integer(name, head_dim) != head_dim:
            raise UnsupportedModelError(
                f"the GGUF file's {keys.prefix}.{name} differs from its head size {head_dim}, which is not supported. "
                "Use the model's safetensors release"
            )
    rope = _rope_parameters(keys, checkpoint, head_dim)
    config: dict[str, Any] = {
        "hidden_size": hidden_size,
        "intermediate_size": keys.integer("feed_forward_length"),
        "num_hidden_layers": keys.integer("block_count"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": keys.integer("attention.head_count_kv", num_heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": keys.integer("context_length"),
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon"),
        # transformers 5 reads rope_parameters, older readers the other two.
        "rope_parameters": rope,
        "rope_theta": rope["rope_theta"],
    }
    if rope["rope_type"] != "default":
        config["rope_scaling"] = rope
    _check_biases(checkpoint, architecture.name)
    if architecture.name == "llama":
        config["attention_bias"] = "blk.0.attn_q.bias" in checkpoint.tensors
        config["mlp_bias"] = "blk.0.ffn_up.bias" in checkpoint.tensors
    if architecture.name == "qwen2":
        config["use_sliding_window"] = False
    return config


def _check_biases(checkpoint: Checkpoint, architecture: str) -> None:
    """Refuse sets of biases that the Hugging Face model of this architecture does not have."""
    biases = {name.split(".")[-2] for name in checkpoint.tensors if name.endswith(".bias")}
    attention, mlp = {"attn_q", "attn_k", "attn_v", "attn_output"}, {"ffn_gate", "ffn_up", "ffn_down"}
    possible: list[set[str]] = {
        "llama": [set(), attention, mlp, attention | mlp],
        "qwen2": [attention - {"attn_output"}],
    }.get(architecture, [set()])
    if biases not in possible:
        raise UnsupportedModelError(
            f"the GGUF file has biases on {', '.join(sorted(biases)) or 'nothing'}, which a {architecture} model "
            "cannot have. Use the model's safetensors release"
        )


def _rope_parameters(keys: _Keys, checkpoint: Checkpoint, head_dim: int) -> dict[str, Any]:
    theta = keys.number("rope.freq_base", 10000.0)
    kind = keys.get("rope.scaling.type")
    linear = keys.number("rope.scale_linear", 1.0)
    if "rope_freqs.weight" in checkpoint.tensors:
        if kind not in (None, "none") or linear != 1.0:
            raise UnsupportedModelError(f"the GGUF file has rope_freqs.weight and rope scaling {kind!r} at once")
        return _llama3_rope(checkpoint, theta, head_dim)
    if kind in (None, "none"):
        if linear == 1.0:
            return {"rope_type": "default", "rope_theta": theta}
        return {"rope_type": "linear", "factor": linear, "rope_theta": theta}
    factor = keys.number("rope.scaling.factor")
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor, "rope_theta": theta}
    if kind == "yarn":
        original = keys.integer("rope.scaling.original_context_length")
        return {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": original,
            "rope_theta": theta,
        }
    raise UnsupportedModelError(
        f"the GGUF file's rope scaling {kind!r} is not supported (supported: none, linear, yarn, Llama 3's frequencies)"
    )


def _llama3_rope(checkpoint: Checkpoint, theta: float, head_dim: int) -> dict[str, Any]:
    """Llama 3's rope parameters from the table of frequency divisors that the file has in their place.

    The parameters are recovered from the table's maximum and the published constants, and accepted only if they give
    the whole table back.
    """
    header = checkpoint.tensors["rope_freqs.weight"]
    if header.dtype != "F32" or header.shape != (head_dim // 2,):
        raise CheckpointError(f"rope_freqs.weight is {header.dtype} {list(header.shape)}, not F32 [{head_dim // 2}]")
    divisors = np.fromfile(header.file, "<f4", count=head_dim // 2, offset=header.offset_bytes)  # [head_dim / 2]
    factor = float(divisors.max())
    if np.all(divisors == 1.0):
        return {"rope_type": "default", "rope_theta": theta}
    frequencies = theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)  # [head_dim / 2]
    turns = _LLAMA3_ORIGINAL_CONTEXT * frequencies / (2 * math.pi)  # within the original context
    low, high = _LLAMA3_LOW_FREQUENCY_FACTOR, _LLAMA3_HIGH_FREQUENCY_FACTOR
    blend = np.clip((turns - low) / (high - low), 0.0, 1.0)
    if not np.allclose(divisors, 1.0 / ((1.0 - blend) / factor + blend), rtol=1e-4, atol=0.0):
        raise UnsupportedModelError(
            "the GGUF file's rope_freqs.weight is not Llama 3's frequency scaling, and no other is supported. "
            "Use the model's safetensors release"
        )
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": _LLAMA3_ORIGINAL_CONTEXT,
        "rope_theta": theta,
    }


def _gpt2_config(keys: _Keys) -> dict[str, Any]:
    return {
        "n_embd": keys.integer("embedding_length"),
        "n_layer": keys.integer("block_count"),
        "n_head": keys.integer("attention.head_count"),
        "n_inner": keys.integer("feed_forward_length"),
        "n_positions": keys.integer("context_length"),
        "layer_norm_epsilon": keys.number("attention.layer_norm_epsilon"),
        "activation_function": "gelu_new",
    }

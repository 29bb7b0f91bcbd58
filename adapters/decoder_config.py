"""What a config.json of the Llama-shaped families says and leaves unsaid: names, defaults and derived values, as data.

transformers' configuration classes say the same, but the first of them takes 2.4 s to import, with transformers and
half of torch behind it: more than reading and packing a small model. tests/adapters/test_decoder_config.py compares
every value with theirs, for every family, so the two cannot drift apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from registry.errors import CheckpointError

# null stands for a value that is derived, or for what the model does not have.
_COMMON: Mapping[str, Any] = {
    "num_key_value_heads": None,
    "head_dim": None,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
_SILU: Mapping[str, Any] = {"hidden_act": "silu"}
_BIASES: Mapping[str, Any] = {"attention_bias": False, "mlp_bias": False}
_WINDOW_BY_LAYER: Mapping[str, Any] = {
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
}
_GEMMA: Mapping[str, Any] = {
    "head_dim": 256,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "use_bidirectional_attention": False,
}
_GEMMA_2_AND_3: Mapping[str, Any] = {
    **_GEMMA,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "layer_types": None,
}


def _sizes(vocab: int, hidden: int, intermediate: int, layers: int, heads: int, positions: int) -> dict[str, Any]:
    return {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": positions,
    }


_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "llama": {**_COMMON, **_SILU, **_BIASES, **_sizes(32000, 4096, 11008, 32, 32, 2048)},
    "mistral": {
        **_COMMON,
        **_SILU,
        **_sizes(32000, 4096, 14336, 32, 32, 131072),
        "num_key_value_heads": 8,
        "sliding_window": 4096,
    },
    "mixtral": {
        **_COMMON,
        **_SILU,
        **_sizes(32000, 4096, 14336, 32, 32, 131072),
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "sliding_window": None,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
    "qwen2": {
        **_COMMON,
        **_SILU,
        **_WINDOW_BY_LAYER,
        **_sizes(151936, 4096, 22016, 32, 32, 32768),
        "num_key_value_heads": 32,
    },
    "qwen3": {
        **_COMMON,
        **_SILU,
        **_WINDOW_BY_LAYER,
        **_sizes(151936, 4096, 22016, 32, 32, 32768),
        "num_key_value_heads": 32,
        "head_dim": 128,
        "attention_bias": False,
    },
    "qwen3_moe": {
        **_COMMON,
        **_SILU,
        **_sizes(151936, 2048, 6144, 24, 32, 32768),
        "num_key_value_heads": 4,
        "attention_bias": False,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "num_local_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "norm_topk_prob": False,
        "decoder_sparse_step": 1,
        "mlp_only_layers": None,
    },
    "phi3": {
        **_COMMON,
        **_SILU,
        **_sizes(32064, 3072, 8192, 32, 32, 4096),
        "rms_norm_eps": 1e-5,
        "original_max_position_embeddings": 4096,
        "sliding_window": None,
    },
    "gemma": {
        **_COMMON,
        **_GEMMA,
        **_sizes(256000, 3072, 24576, 28, 16, 8192),
        "num_key_value_heads": 16,
        "hidden_act": "gelu_pytorch_tanh",
    },
    "gemma2": {
        **_COMMON,
        **_GEMMA_2_AND_3,
        **_sizes(256000, 2304, 9216, 26, 8, 8192),
        "num_key_value_heads": 4,
        "final_logit_softcapping": 30.0,
        "attn_logit_softcapping": 50.0,
    },
    "gemma3_text": {
        **_COMMON,
        **_GEMMA_2_AND_3,
        **_sizes(262208, 2304, 9216, 26, 8, 131072),
        "num_key_value_heads": 4,
        "final_logit_softcapping": None,
        "attn_logit_softcapping": None,
        "sliding_window_pattern": 6,
    },
    "granite": {
        **_COMMON,
        **_SILU,
        **_BIASES,
        **_sizes(32000, 4096, 11008, 32, 32, 2048),
        "embedding_multiplier": 1.0,
        "logits_scaling": 1.0,
        "residual_multiplier": 1.0,
        "attention_multiplier": 1.0,
    },
    "olmo2": {
        **_COMMON,
        **_SILU,
        **_sizes(50304, 4096, 11008, 32, 32, 2048),
        "rms_norm_eps": 1e-5,
        "attention_bias": False,
    },
    "smollm3": {
        **_COMMON,
        **_SILU,
        **_BIASES,
        **_sizes(128256, 2048, 11008, 36, 16, 32768),
        "num_key_value_heads": 4,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "sliding_window": None,
        "layer_types": None,
        "no_rope_layers": None,
        "no_rope_layer_interval": 4,
    },
}
DECODER_MODEL_TYPES = frozenset(_DEFAULTS)

_ROPE_THETAS: Mapping[str, float] = {"mixtral": 1e6, "smollm3": 2e6}
_ROPE_THETA = 1e4
_GEMMA3_ROPE_THETA = 1e6
_OTHER_NAMES: Mapping[str, str] = {"num_local_experts": "num_experts"}

# What a value has to be; all other values are whole numbers, at least 1.
_FLAGS = frozenset(
    {"tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window", "norm_topk_prob"}
    | {"use_bidirectional_attention"}
)
_NUMBERS = frozenset(
    {"rms_norm_eps", "final_logit_softcapping", "attn_logit_softcapping", "query_pre_attn_scalar"}
    | {"embedding_multiplier", "logits_scaling", "residual_multiplier", "attention_multiplier"}
)
_TEXTS = frozenset({"hidden_act", "hidden_activation"})
_LISTS: Mapping[str, type] = {"layer_types": str, "no_rope_layers": int, "mlp_only_layers": int}
_MAY_BE_ZERO = frozenset({"max_window_layers", "num_local_experts"})
_MAY_BE_NULL = frozenset(
    {"num_key_value_heads", "sliding_window", "use_bidirectional_attention"}
    | {"final_logit_softcapping", "attn_logit_softcapping"}
)
_LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})
# The settings that each kind of rotary frequencies needs.
_ROPE_NEEDS: Mapping[str, tuple[str, ...]] = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "longrope": ("short_factor", "long_factor"),
}


def complete_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Every setting of a model of `DECODER_MODEL_TYPES` under transformers' names, what the config leaves out included.

    Beside the names of its family it has `rope_parameters`: one mapping with `rope_type` and `rope_theta`, or for
    gemma3_text one for each kind of layer. `layer_types` and `no_rope_layers`, where a family has them, name all
    layers.

    Args:
        config: the dict of config.json.

    Raises:
        CheckpointError: a value that this setting cannot have, named in the message.
    """
    model_type = config["model_type"]
    found: dict[str, Any] = {"model_type": model_type}
    for name, default in _DEFAULTS[model_type].items():
        value = config.get(name, config.get(_OTHER_NAMES.get(name, name), default))
        is_null = value is None and (default is None or name in _MAY_BE_NULL)
        if not (is_null or _is_possible(name, value)):
            raise _invalid(model_type, f"{name} cannot be {value!r}")
        found[name] = value
    if found["num_key_value_heads"] is None:
        found["num_key_value_heads"] = found["num_attention_heads"]
    if found["head_dim"] is None:
        if found["hidden_size"] % found["num_attention_heads"]:
            raise _invalid(model_type, "hidden_size is not a multiple of num_attention_heads, and there is no head_dim")
        found["head_dim"] = found["hidden_size"] // found["num_attention_heads"]
    if found["num_attention_heads"] % found["num_key_value_heads"]:
        raise _invalid(model_type, "num_attention_heads is not a multiple of num_key_value_heads")
    if found.get("num_local_experts", 0) > 0 and found["num_experts_per_tok"] > found["num_local_experts"]:
        raise _invalid(model_type, "num_experts_per_tok is more than the number of experts")
    if model_type == "gemma" and found["hidden_act"] == "gelu":  # what early releases say, and do not mean
        found["hidden_act"] = "gelu_pytorch_tanh"
    if not found.get("use_sliding_window", True) and model_type != "smollm3":
        found["sliding_window"] = None
    for name, none in (("mlp_only_layers", []), ("use_bidirectional_attention", False)):
        if name in found and found[name] is None:
            found[name] = none
    _complete_layers(found)
    if model_type == "gemma3_text":
        found["rope_parameters"] = _gemma3_ropes(config, found)
        for rope in found["rope_parameters"].values():
            _check_rope(rope, found)
    else:
        found["rope_parameters"] = _rope(config, found)
        _check_rope(found["rope_parameters"], found)
    return found


def _complete_layers(found: dict[str, Any]) -> None:
    """Set what names each layer, where the family has it."""
    layers = range(found["num_hidden_layers"])
    if "no_rope_layers" in found:
        if found["no_rope_layers"] is None:
            found["no_rope_layers"] = [int((i + 1) % found["no_rope_layer_interval"] != 0) for i in layers]
        if len(found["no_rope_layers"]) < len(layers):
            raise _invalid(found["model_type"], f"no_rope_layers names fewer than {len(layers)} layers")
    if "layer_types" not in found:
        return
    if found["layer_types"] is None:
        is_sliding = _has_window(found)
        found["layer_types"] = ["sliding_attention" if is_sliding(i) else "full_attention" for i in layers]
    if len(found["layer_types"]) != len(layers) or not _LAYER_TYPES.issuperset(found["layer_types"]):
        raise _invalid(found["model_type"], f"layer_types must name {len(layers)} layers {sorted(_LAYER_TYPES)}")


def _has_window(found: Mapping[str, Any]) -> Callable[[int], bool]:
    """Which layers have a sliding window where the config does not name them, by their index."""
    model_type, window = found["model_type"], found["sliding_window"]
    if model_type in ("gemma2", "gemma3_text"):
        pattern = found.get("sliding_window_pattern", 2)
        return lambda i: (i + 1) % pattern != 0
    if model_type == "smollm3":
        uses_window = found["use_sliding_window"] and window is not None
        return lambda i: uses_window and not found["no_rope_layers"][i]
    return lambda i: window is not None and i >= found["max_window_layers"]


def _rope(config: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary settings of a family whose layers share them."""
    model_type = found["model_type"]
    rope = dict(_mapping(config, "rope_scaling") or _mapping(config, "rope_parameters") or {})
    if any(kind in rope for kind in _LAYER_TYPES):
        raise _invalid(model_type, "rope_parameters are given for kinds of layers, which this family does not have")
    rope.setdefault("rope_theta", config.get("rope_theta", _ROPE_THETAS.get(model_type, _ROPE_THETA)))
    rope.setdefault("rope_type", rope.get("type", "default"))
    if (partial := config.get("partial_rotary_factor")) is not None:
        rope.setdefault("partial_rotary_factor", partial)
    if model_type == "phi3":
        rope.setdefault("partial_rotary_factor", 1.0)
        rope["rope_type"] = {"su": "longrope", "yarn": "longrope"}.get(rope["rope_type"], rope["rope_type"])
        if rope["rope_type"] not in ("default", "longrope"):
            raise _invalid(model_type, f"rope_type cannot be {rope['rope_type']!r}")
    if rope["rope_type"] in ("llama3", "yarn", "longrope"):
        original = found.get("original_max_position_embeddings", config.get("original_max_position_embeddings"))
        if original is not None:
            rope["original_max_position_embeddings"] = original
        rope.setdefault("original_max_position_embeddings", found["max_position_embeddings"])
    return rope


def _gemma3_ropes(config: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The rotary settings for the layers that see everything, and for those with a window."""
    given = _mapping(config, "rope_parameters") or {}
    ropes = {kind: dict(given.get(kind) or {"rope_type": "default"}) for kind in sorted(_LAYER_TYPES)}
    ropes["full_attention"] |= _mapping(config, "rope_scaling") or {}
    thetas = {
        "full_attention": config.get("rope_theta", _GEMMA3_ROPE_THETA),
        "sliding_attention": config.get("rope_local_base_freq", _ROPE_THETA),
    }
    for kind, rope in ropes.items():
        rope.setdefault("rope_theta", thetas[kind])
        rope.setdefault("rope_type", rope.get("type", "default"))
        if rope["rope_type"] in ("llama3", "yarn", "longrope"):
            rope.setdefault("original_max_position_embeddings", found["max_position_embeddings"])
    return ropes


def _check_rope(rope: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    model_type, kind = found["model_type"], rope["rope_type"]
    partial = rope.get("partial_rotary_factor", 1.0)
    if not _is_number(rope["rope_theta"]) or not _is_number(partial) or not 0 < partial <= 1:
        raise _invalid(model_type, "rope_theta must be a number, and partial_rotary_factor one up to 1")
    num_frequencies = int(found["head_dim"] * partial) // 2
    for name in _ROPE_NEEDS.get(kind, ()):
        value = rope.get(name)
        if kind == "longrope":
            is_right = isinstance(value, list) and len(value) == num_frequencies and all(map(_is_number, value))
        else:
            is_right = _is_number(value)
        if not is_right:
            raise _invalid(model_type, f"the rotary setting {name} of {kind!r} cannot be {value!r}")


def _mapping(config: Mapping[str, Any], name: str) -> Mapping[str, Any] | None:
    value = config.get(name)
    if value is not None and not isinstance(value, Mapping):
        raise _invalid(config["model_type"], f"{name} cannot be {value!r}")
    return value


def _is_possible(name: str, value: Any) -> bool:
    if name in _FLAGS:
        return isinstance(value, bool)
    if name in _NUMBERS:
        return _is_number(value)
    if name in _TEXTS:
        return isinstance(value, str)
    if name in _LISTS:
        return isinstance(value, list) and all(isinstance(item, _LISTS[name]) for item in value)
    least = 0 if name in _MAY_BE_ZERO else 1
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _invalid(model_type: str, why: str) -> CheckpointError:
    return CheckpointError(f"config.json is not valid for model_type {model_type!r}: {why}")

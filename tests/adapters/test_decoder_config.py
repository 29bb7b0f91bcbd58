"""The settings of the Llama-shaped families are those that transformers' own classes complete a config.json to."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from transformers import CONFIG_MAPPING

from adapters.decoder_config import DECODER_MODEL_TYPES, complete_config
from registry.errors import CheckpointError

_LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_SMALL = {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 2, "num_hidden_layers": 5}
_LONG = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}

# Beside the empty config of each family.
_CONFIGS: dict[str, dict[str, Any]] = {
    "llama without kv heads": {"model_type": "llama", "num_attention_heads": 16, "num_key_value_heads": None},
    "llama head_dim": {"model_type": "llama", **_SMALL, "head_dim": 24, "attention_bias": True, "mlp_bias": True},
    "llama old theta": {"model_type": "llama", "rope_theta": 5e5, "tie_word_embeddings": True},
    "llama rope_scaling": {"model_type": "llama", "rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}},
    "llama null scaling": {"model_type": "llama", "rope_scaling": None, "rope_theta": 3e4},
    "llama both": {
        "model_type": "llama",
        "rope_scaling": {**_LLAMA3, "original_max_position_embeddings": 8192},
        "rope_parameters": {"rope_type": "default", "rope_theta": 2.0},
        "rope_theta": 5e5,
        "max_position_embeddings": 131072,
    },
    "llama original length": {"model_type": "llama", "rope_parameters": _LLAMA3, "max_position_embeddings": 4096},
    "llama partial": {"model_type": "llama", "partial_rotary_factor": 0.5},
    "mistral no window": {"model_type": "mistral", "sliding_window": None, "rope_theta": 1e6, "head_dim": 160},
    "mixtral experts": {"model_type": "mixtral", **_SMALL, "num_local_experts": 4, "num_experts_per_tok": 1},
    "qwen2 yarn": {
        "model_type": "qwen2",
        "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
        "max_position_embeddings": 131072,
    },
    "qwen2 windows": {"model_type": "qwen2", **_SMALL, "use_sliding_window": True, "max_window_layers": 3},
    "qwen2 layer types": {
        "model_type": "qwen2",
        **_SMALL,
        "use_sliding_window": True,
        "layer_types": ["full_attention", "sliding_attention"] * 2 + ["full_attention"],
    },
    "qwen3 unused window": {"model_type": "qwen3", **_SMALL, "sliding_window": 64, "attention_bias": True},
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        **_SMALL,
        "head_dim": 32,
        "num_experts": 16,
        "num_experts_per_tok": 4,
        "mlp_only_layers": [1],
        "decoder_sparse_step": 2,
        "norm_topk_prob": True,
        "use_sliding_window": True,
        "sliding_window": 128,
    },
    "phi3 long": {
        "model_type": "phi3",
        **_SMALL,
        "rope_scaling": {"type": "longrope", **_LONG},
        "max_position_embeddings": 131072,
        "original_max_position_embeddings": 2048,
        "pad_token_id": None,
    },
    "phi3 partial": {"model_type": "phi3", **_SMALL, "partial_rotary_factor": 0.75},
    "gemma gelu": {"model_type": "gemma", **_SMALL, "hidden_act": "gelu"},
    "gemma2 layers": {"model_type": "gemma2", **_SMALL, "sliding_window": 32, "final_logit_softcapping": None},
    "gemma3 pattern": {"model_type": "gemma3_text", **_SMALL, "sliding_window_pattern": 3, "rope_theta": 5e5},
    "gemma3 scaling": {
        "model_type": "gemma3_text",
        **_SMALL,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "rope_local_base_freq": 5e3,
    },
    "gemma3 new": {
        "model_type": "gemma3_text",
        **_SMALL,
        "num_hidden_layers": 7,
        "rope_parameters": {
            "full_attention": {**_LLAMA3, "rope_theta": 7.0},
            "sliding_attention": {"rope_type": "default"},
        },
    },
    "granite": {"model_type": "granite", "attention_multiplier": 0.5, "logits_scaling": 8, "residual_multiplier": 0.2},
    "smollm3 windows": {"model_type": "smollm3", **_SMALL, "use_sliding_window": True, "sliding_window": 32},
    "smollm3 interval": {"model_type": "smollm3", **_SMALL, "no_rope_layer_interval": 2},
    "smollm3 named": {"model_type": "smollm3", **_SMALL, "no_rope_layers": [1, 0, 1, 1, 0]},
} | {model_type: {"model_type": model_type} for model_type in sorted(DECODER_MODEL_TYPES)}

_NOT_THEIRS = frozenset({"max_window_layers", "sliding_window_pattern"})  # no attribute, or under another name


@pytest.mark.parametrize("name", list(_CONFIGS))
def test_it_is_completed_as_transformers_completes_it(name: str) -> None:
    config = _CONFIGS[name]
    values = {key: value for key, value in copy.deepcopy(config).items() if key != "model_type"}
    completed = complete_config(config)
    assert config == {"model_type": config["model_type"], **values}  # it was not changed
    theirs = CONFIG_MAPPING[config["model_type"]](**values)
    for key in completed.keys() - _NOT_THEIRS - {"head_dim", "rope_parameters", "use_bidirectional_attention"}:
        assert completed[key] == getattr(theirs, key), key
    bidirectional = bool(getattr(theirs, "use_bidirectional_attention", False))
    assert completed.get("use_bidirectional_attention", False) == bidirectional
    head_dim = getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
    assert completed["head_dim"] == head_dim
    assert completed["rope_parameters"] == theirs.rope_parameters


@pytest.mark.parametrize("name", list(_CONFIGS))
def test_what_transformers_writes_means_the_same(name: str) -> None:
    values = {key: value for key, value in copy.deepcopy(_CONFIGS[name]).items() if key != "model_type"}
    written = json.loads(CONFIG_MAPPING[_CONFIGS[name]["model_type"]](**values).to_json_string(use_diff=False))
    completed = complete_config(_CONFIGS[name])
    if completed["model_type"] == "gemma3_text":
        del completed["sliding_window_pattern"]  # written under another name, and needed no more
        again = complete_config(written)
        del again["sliding_window_pattern"]
        assert again == completed
    else:
        assert complete_config(written) == completed


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "llama", "hidden_size": "64"}, "hidden_size cannot be '64'"),
        ({"model_type": "llama", "hidden_size": None}, "hidden_size cannot be None"),
        ({"model_type": "llama", "num_hidden_layers": 0}, "num_hidden_layers cannot be 0"),
        ({"model_type": "llama", "vocab_size": True}, "vocab_size cannot be True"),
        ({"model_type": "llama", "rms_norm_eps": float("nan")}, "rms_norm_eps cannot be nan"),
        ({"model_type": "llama", "attention_bias": 1}, "attention_bias cannot be 1"),
        ({"model_type": "llama", "hidden_act": ["silu"]}, "hidden_act cannot be"),
        (
            {"model_type": "llama", "hidden_size": 100, "num_attention_heads": 3},
            "not a multiple of num_attention_heads",
        ),
        ({"model_type": "llama", "num_key_value_heads": 5}, "not a multiple of num_key_value_heads"),
        ({"model_type": "mixtral", "num_experts_per_tok": 9}, "more than the number of experts"),
        ({"model_type": "llama", "rope_scaling": "yarn"}, "rope_scaling cannot be 'yarn'"),
        ({"model_type": "llama", "rope_theta": "big"}, "rope_theta must be a number"),
        ({"model_type": "llama", "rope_scaling": {"type": "linear"}}, "factor of 'linear' cannot be None"),
        ({"model_type": "llama", "rope_parameters": {"full_attention": {}}}, "kinds of layers"),
        ({"model_type": "phi3", "rope_scaling": {"type": "longrope", **_LONG}}, "short_factor of 'longrope'"),
        ({"model_type": "phi3", "rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type cannot be 'linear'"),
        ({"model_type": "qwen3", "layer_types": ["full_attention"]}, "layer_types must name 32 layers"),
        ({"model_type": "gemma2", **_SMALL, "layer_types": ["chunked_attention"] * 5}, "layer_types must name 5"),
        ({"model_type": "smollm3", **_SMALL, "no_rope_layers": [1]}, "no_rope_layers names fewer than 5"),
        ({"model_type": "qwen3_moe", "mlp_only_layers": ["all"]}, "mlp_only_layers cannot be"),
    ],
)
def test_what_a_setting_cannot_be_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json is not valid for model_type") as caught:
        complete_config(config)
    assert message in caught.value.message

"""The spec and the parameters of each native family are what transformers' own modules say."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from model_worker.engine.models.decoder_parameters import parameter_shapes
from model_worker.engine.models.decoder_spec import NATIVE_MODEL_TYPES, read_spec
from registry.errors import UnsupportedModelError
from tests.fakes.tiny_models import TINY_MODELS

_SMALL = {
    "hidden_size": 64,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "num_hidden_layers": 7,
    "vocab_size": 96,
    "pad_token_id": None,
}

_CONFIGS: dict[str, dict[str, Any]] = (
    {model_type: {"model_type": model_type, **_SMALL} for model_type in sorted(NATIVE_MODEL_TYPES)}
    | {
        f"{model_type} with biases": {"model_type": model_type, **_SMALL, "attention_bias": True, "mlp_bias": True}
        for model_type in sorted(NATIVE_MODEL_TYPES)
    }
    | {
        f"{model_type} with a head of its own": {
            "model_type": model_type,
            **_SMALL,
            "head_dim": 12,
            "num_key_value_heads": 4,
            "tie_word_embeddings": False,
        }
        for model_type in sorted(NATIVE_MODEL_TYPES)
    }
    | {
        f"tiny {name}": {"model_type": tiny.model_type, **_SMALL, "num_hidden_layers": 2, **tiny.config}
        for name, tiny in TINY_MODELS.items()
        if tiny.model_type in NATIVE_MODEL_TYPES and "longrope" not in name
    }
    | {
        "qwen2 windows": {"model_type": "qwen2", **_SMALL, "use_sliding_window": True, "max_window_layers": 3},
        "qwen3_moe windows": {"model_type": "qwen3_moe", **_SMALL, "use_sliding_window": True},
        "qwen3_moe dense layers": {
            "model_type": "qwen3_moe",
            **_SMALL,
            "mlp_only_layers": [1],
            "decoder_sparse_step": 2,
            "num_experts": 6,
            "num_experts_per_tok": 2,
        },
        "smollm3 windows": {"model_type": "smollm3", **_SMALL, "use_sliding_window": True, "sliding_window": 5},
    }
)


def _reference(config: dict[str, Any]) -> Any:
    values = {key: value for key, value in config.items() if key != "model_type"}
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            CONFIG_MAPPING[config["model_type"]](**values), attn_implementation="eager"
        )


@pytest.mark.parametrize("name", list(_CONFIGS))
def test_parameters_are_those_of_transformers(name: str) -> None:
    model = _reference(_CONFIGS[name])
    ties = model.get_expanded_tied_weights_keys(all_submodels=True)
    spec = read_spec(_CONFIGS[name], 64)
    expected = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items() if key not in ties}
    assert parameter_shapes(spec) == expected
    assert ties == ({"lm_head.weight": "model.embed_tokens.weight"} if spec.tied_head else {})


@pytest.mark.parametrize("name", list(_CONFIGS))
def test_layers_are_those_of_transformers(name: str) -> None:
    config = _CONFIGS[name]
    model = _reference(config)
    spec = read_spec(config, 64)
    assert len(spec.layers) == len(model.model.layers)
    for ours, theirs in zip(spec.layers, model.model.layers, strict=True):
        attention = theirs.self_attn
        # In these the window is an argument of the attention, for all layers; in the others a module knows its own.
        everywhere = config["model_type"] in ("mistral", "mixtral", "phi3")
        window = model.config.sliding_window if everywhere else getattr(attention, "sliding_window", None)
        assert ours.attention.scale == attention.scaling
        assert ours.attention.sliding_window == window
        # gemma3_text keeps the number, but does not pass it on; test_parity.py has a model with one.
        softcap = None if config["model_type"] == "gemma3_text" else getattr(attention, "attn_logit_softcapping", None)
        assert ours.attention.softcap == softcap
        assert (ours.rope is not None) == bool(getattr(attention, "use_rope", True))
        assert (ours.mixture is not None) == hasattr(theirs.mlp, "experts")
        if ours.mixture is not None:
            router = theirs.mlp.gate
            assert (ours.mixture.num_experts, ours.mixture.num_chosen) == (router.num_experts, router.top_k)
            assert ours.mixture.normalize == getattr(router, "norm_topk_prob", True)


@pytest.mark.parametrize("name", list(_CONFIGS))
def test_rotary_frequencies_are_those_of_transformers(name: str) -> None:
    model = _reference(_CONFIGS[name])
    spec = read_spec(_CONFIGS[name], 64)
    theirs = type(model.model.rotary_emb)(model.config)
    kinds = theirs.rope_type if isinstance(theirs.rope_type, dict) else ("all",)
    assert set(spec.ropes) == set(kinds)
    for kind in kinds:
        prefix = "" if kind == "all" else f"{kind}_"
        assert torch.equal(spec.ropes[kind].inverse_frequencies, getattr(theirs, f"{prefix}inv_freq"))
        assert spec.ropes[kind].attention_scaling == getattr(theirs, f"{prefix}attention_scaling")
    for index, layer in enumerate(spec.layers):
        if layer.rope is not None:
            assert layer.rope == ("all" if kinds == ("all",) else model.config.layer_types[index])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "opt"}, "does not know model type 'opt'"),
        ({"model_type": "llama", "hidden_act": "relu"}, "silu and gelu_pytorch_tanh only"),
        ({"model_type": "gemma", "use_bidirectional_attention": True}, "causal attention only"),
        ({"model_type": "llama", "head_dim": 264}, "heads of up to 256"),
        ({"model_type": "gemma2", "sliding_window": None}, "Layer 0 has a sliding window"),
        (
            {"model_type": "smollm3", "sliding_window": 8, "layer_types": ["sliding_attention"] * 36},
            "Layer 0 has a sliding window",
        ),
        ({"model_type": "llama", "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"model_type": "llama", "rope_scaling": {"type": "proportional"}}, "frequencies 'proportional'"),
    ],
)
def test_what_the_decoder_does_not_compute_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        read_spec(config, 64)

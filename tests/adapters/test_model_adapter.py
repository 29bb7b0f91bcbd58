"""The KV cache's size by our reading of the config, against the cache that transformers really fills."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from adapters.model_adapter import find_model_adapter
from registry.errors import UnsupportedModelError
from registry.families import families

WIDE = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
LLAMA = {**WIDE, "intermediate_size": 48, "num_key_value_heads": 2}
FALCON = {**WIDE, "alibi": False}
MOE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **LLAMA},
    "llama head_dim": {"model_type": "llama", **LLAMA, "head_dim": 12},
    "mistral": {"model_type": "mistral", **LLAMA, "sliding_window": None},
    "mixtral": {"model_type": "mixtral", **LLAMA, **MOE},
    "qwen3_moe": {"model_type": "qwen3_moe", **LLAMA, **MOE, "head_dim": 16},
    "gpt2": {"model_type": "gpt2", "vocab_size": 64, "n_embd": 32, "n_layer": 3, "n_head": 4},
    "gpt_neox": {"model_type": "gpt_neox", **WIDE, "intermediate_size": 48},
    "opt": {"model_type": "opt", **WIDE, "ffn_dim": 48, "word_embed_proj_dim": 32},
    "bloom": {"model_type": "bloom", "vocab_size": 64, "hidden_size": 32, "n_layer": 3, "n_head": 4},
    "gemma2": {"model_type": "gemma2", **LLAMA, "head_dim": 16},
    "phi3": {"model_type": "phi3", **LLAMA, "pad_token_id": 0},
    "falcon multi-query": {"model_type": "falcon", **FALCON, "multi_query": True},
    "falcon grouped": {"model_type": "falcon", **FALCON, "new_decoder_architecture": True, "num_kv_heads": 2},
    "falcon multi-head": {"model_type": "falcon", **FALCON, "multi_query": False, "new_decoder_architecture": False},
    "gpt_oss": {"model_type": "gpt_oss", **LLAMA, **MOE, "head_dim": 16},
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@torch.inference_mode()
def test_kv_values_per_token(config) -> None:
    values = {key: value for key, value in config.items() if key != "model_type"}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config["model_type"], **values))
    cache = model(torch.arange(5)[None], use_cache=True).past_key_values
    filled = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
    adapter = find_model_adapter(config)
    assert adapter.kv_values_per_token == filled / 5
    assert (adapter.hidden_size, adapter.vocab_size) == (32, 64)


def test_multi_head_latent_attention_is_counted_expanded() -> None:
    config = {
        "model_type": "deepseek_v3",
        **LLAMA,
        "num_key_value_heads": 4,
        "q_lora_rank": 16,
        "kv_lora_rank": 8,
        "qk_nope_head_dim": 6,
        "qk_rope_head_dim": 4,
        "v_head_dim": 5,
    }
    assert find_model_adapter(config).kv_values_per_token == 3 * 4 * ((6 + 4) + 5)


def test_every_served_family_has_an_adapter() -> None:
    for family in families().values():
        if family.refused is None:
            for model_type in family.model_types:
                adapter = find_model_adapter({"model_type": model_type, "architectures": [family.architectures[0]]})
                assert adapter.family is family
                assert adapter.max_position_embeddings > 0
                assert adapter.intermediate_size > 0


def test_context_without_position_limits() -> None:
    bloom = {"model_type": "bloom", "vocab_size": 64, "hidden_size": 32}
    assert find_model_adapter(bloom).max_position_embeddings == families()["bloom"].context_length
    assert find_model_adapter({**bloom, "seq_length": 77}).max_position_embeddings == 77


@pytest.mark.parametrize("settings", [{"is_causal": False}, {"use_bidirectional_attention": True}])
def test_models_that_see_later_tokens_are_refused(settings: dict[str, Any]) -> None:
    """transformers' decoders take these from any config; with our attention they would answer nonsense in silence."""
    with pytest.raises(UnsupportedModelError, match="causal"):
        find_model_adapter({"model_type": "llama", **LLAMA, **settings})
    find_model_adapter({"model_type": "llama", **LLAMA, "is_causal": True, "use_bidirectional_attention": None})

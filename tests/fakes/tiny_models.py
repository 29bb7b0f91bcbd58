"""Tiny random models of real families, as checkpoints: every kind of layer that the engine has to get right."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from adapters.load_plan import LoadPlan, MemoryEstimate
from registry.checkpoint import read_checkpoint
from registry.families import ModelFamily

VOCAB_SIZE = 128
MAX_MODEL_LEN = 256

_COMMON: Mapping[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": MAX_MODEL_LEN,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


@dataclass(frozen=True, slots=True)
class TinyModel:
    """A family in one configuration.

    Attributes:
        config: beside or instead of the common values.
        without: common values that the family does not have.
        reference_attention: of transformers; sdpa where its eager attention is wrong.
        seed: of the weights; chosen so that the greedy tokens vary.
    """

    model_type: str
    config: Mapping[str, Any] = field(default_factory=dict)
    without: tuple[str, ...] = ()
    reference_attention: str = "eager"
    seed: int = 0


def _mixture(**more: Any) -> dict[str, Any]:
    return {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, **more}


def _sliding(window: int, layers: int = 2) -> dict[str, Any]:
    types = ["sliding_attention" if i % 2 == 0 else "full_attention" for i in range(layers)]
    return {"sliding_window": window, "layer_types": types, "num_hidden_layers": layers}


_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.1, 1.2, 1.3, 1.4],
    "long_factor": [2.0, 3.0, 4.0, 5.0],
    "original_max_position_embeddings": MAX_MODEL_LEN,
}
_GPT_STYLE = ("intermediate_size", "num_key_value_heads")
_FALCON = {"ffn_hidden_size": 48, "bias": True}

TINY_MODELS: Mapping[str, TinyModel] = {
    "llama": TinyModel("llama"),
    "llama-tied": TinyModel("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "llama-llama3-rope": TinyModel("llama", {"rope_parameters": _LLAMA3_ROPE}),
    "mistral-window": TinyModel("mistral", {"sliding_window": 24}),
    "mixtral": TinyModel("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}),
    "qwen2": TinyModel("qwen2", {"use_sliding_window": False}),
    "qwen2-mixed-window": TinyModel("qwen2", {"use_sliding_window": True, "max_window_layers": 1, **_sliding(20)}),
    "qwen2_moe": TinyModel(
        "qwen2_moe", _mixture(shared_expert_intermediate_size=40, decoder_sparse_step=1, use_sliding_window=False)
    ),
    "qwen3": TinyModel("qwen3", {"head_dim": 16}),
    "qwen3_moe": TinyModel("qwen3_moe", _mixture(head_dim=16, norm_topk_prob=True)),
    "gpt2": TinyModel("gpt2", {"n_inner": 48}, _GPT_STYLE),
    "gpt_neox": TinyModel("gpt_neox", {"rotary_pct": 0.5}, ("num_key_value_heads",)),
    "gpt_neox-serial": TinyModel("gpt_neox", {"use_parallel_residual": False}, ("num_key_value_heads",)),
    "opt": TinyModel("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32}, _GPT_STYLE),
    "opt-projected": TinyModel(
        "opt", {"ffn_dim": 48, "word_embed_proj_dim": 16, "do_layer_norm_before": False}, _GPT_STYLE
    ),
    "bloom": TinyModel("bloom", {}, (*_GPT_STYLE, "max_position_embeddings")),
    "bloom-odd-heads": TinyModel(
        "bloom",
        {"hidden_size": 48, "num_attention_heads": 6, "apply_residual_connection_post_layernorm": True},
        (*_GPT_STYLE, "max_position_embeddings"),
    ),
    "gemma": TinyModel("gemma", {"head_dim": 16}),
    "gemma2": TinyModel(
        "gemma2",
        {
            "head_dim": 16,
            "query_pre_attn_scalar": 24,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 3.0,
            **_sliding(24),
        },
    ),
    "gemma3_text": TinyModel("gemma3_text", {"head_dim": 16, "query_pre_attn_scalar": 24, **_sliding(24, 3)}),
    "gemma3_text-softcaps": TinyModel(
        "gemma3_text",
        {"head_dim": 16, "attn_logit_softcapping": 0.5, "final_logit_softcapping": 3.0, **_sliding(24, 3)},
    ),
    "phi": TinyModel("phi", {"partial_rotary_factor": 0.5}),
    "phi3": TinyModel("phi3", {"sliding_window": 24}),
    "phi3-longrope": TinyModel(
        "phi3",
        {
            "rope_parameters": _LONGROPE,
            "original_max_position_embeddings": MAX_MODEL_LEN,
            "max_position_embeddings": 4 * MAX_MODEL_LEN,
        },
    ),
    "falcon-multi-query": TinyModel("falcon", {"multi_query": True, **_FALCON}, _GPT_STYLE),
    "falcon-new-arch": TinyModel(
        "falcon", {"new_decoder_architecture": True, "num_kv_heads": 2, **_FALCON}, _GPT_STYLE, seed=1
    ),
    "falcon-alibi": TinyModel(
        "falcon",
        {"alibi": True, "multi_query": False, "parallel_attn": False, **_FALCON},
        _GPT_STYLE,
        reference_attention="sdpa",
        seed=1,
    ),
    "starcoder2-window": TinyModel("starcoder2", {"sliding_window": 24}),
    "olmo2": TinyModel("olmo2"),
    "llama4-chunked": TinyModel(
        "llama4_text",
        {
            "head_dim": 16,
            "intermediate_size_mlp": 48,
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "interleave_moe_layer_step": 2,
            "attention_chunk_size": 24,
            "attn_temperature_tuning": False,
            "num_hidden_layers": 4,
        },
    ),
    "llama4-temperature": TinyModel(
        "llama4_text",
        {
            "head_dim": 16,
            "intermediate_size_mlp": 48,
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "interleave_moe_layer_step": 2,
            "attention_chunk_size": 32,
            "attn_temperature_tuning": True,
            "floor_scale": 8,
            "attn_scale": 0.5,
            "num_hidden_layers": 4,
            "no_rope_layers": [1, 0, 1, 0],
            "layer_types": ["chunked_attention", "full_attention"] * 2,
        },
    ),
    "granite": TinyModel(
        "granite",
        {
            "embedding_multiplier": 3.0,
            "logits_scaling": 2.0,
            "residual_multiplier": 0.5,
            "attention_multiplier": 0.2,
        },
    ),
    "smollm3": TinyModel("smollm3", {"no_rope_layers": [1, 0]}),
    "deepseek_v3": TinyModel(
        "deepseek_v3",
        {
            "moe_intermediate_size": 24,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "num_experts_per_tok": 2,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "num_key_value_heads": 4,
            "kv_lora_rank": 16,
            "q_lora_rank": 24,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 16,
            "v_head_dim": 12,
        },
    ),
    "gpt_oss": TinyModel(
        "gpt_oss",
        {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, **_sliding(24)},
    ),
    "cohere2": TinyModel("cohere2", {"head_dim": 16, "logit_scale": 0.3, **_sliding(24)}),
}


def build_tiny_model(name: str) -> PreTrainedModel:
    """The model with transformers' own attention, in float32. Norms and biases are random too: no part can hide."""
    tiny = TINY_MODELS[name]
    values = {key: value for key, value in _COMMON.items() if key not in tiny.without} | dict(tiny.config)
    config = CONFIG_MAPPING[tiny.model_type](**values)
    torch.manual_seed(tiny.seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation=tiny.reference_attention
    )
    embedding = model.get_input_embeddings().weight
    with torch.no_grad():
        for tensor_name, tensor in model.state_dict().items():
            if not tensor.is_floating_point():
                continue
            if tensor.data_ptr() == embedding.data_ptr():
                # Small, so that the layers decide the next token even where the output head is the same matrix.
                tensor.normal_(0.0, 0.02)
            elif tensor.ndim >= 2:
                tensor.normal_(0.0, 0.3)
            elif "norm" in tensor_name.lower() or "ln_" in tensor_name:
                tensor.add_(torch.randn_like(tensor) * 0.2)
            else:
                tensor.normal_(0.0, 0.3)
    return model.eval()


def with_more_tokens(model: PreTrainedModel, num_tokens: int, *, seed: int = 7) -> PreTrainedModel:
    """A copy with tokens at the end of its vocabulary that are often the most likely ones."""
    resized = copy.deepcopy(model)
    old_size = resized.config.vocab_size
    resized.resize_token_embeddings(old_size + num_tokens, mean_resizing=False)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for table in dict.fromkeys((resized.get_input_embeddings().weight, resized.get_output_embeddings().weight)):
            table[old_size:] = torch.randn(table[old_size:].shape, generator=generator) * table[:old_size].std() * 4
        if (bias := getattr(resized.get_output_embeddings(), "bias", None)) is not None:
            bias[old_size:] = torch.randn(num_tokens, generator=generator) * 0.3
    return resized


def make_tiny_plan(path: Path, *, dtype: str = "float32", max_model_len: int = MAX_MODEL_LEN) -> LoadPlan:
    """A plan for a saved tiny model."""
    config = json.loads((path / "config.json").read_text())
    return LoadPlan(
        path=path,
        family=ModelFamily("tiny", (config["model_type"],), (), ("completion",), max_model_len, None, "", "", None),
        checkpoint=read_checkpoint(path),
        config=config,
        dtype=dtype,
        quantization=None,
        deltas=(),
        tokenizer_path=path,
        chat_template=None,
        stop_token_ids=(),
        max_model_len=max_model_len,
        memory=MemoryEstimate(weights_bytes=0, kv_bytes_per_token=0, activations_bytes=0),
        vocab_size=VOCAB_SIZE,
    )

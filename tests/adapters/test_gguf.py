"""Tiny random models through a GGUF file: config, weights and logits come back exactly, the unknown is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tokenizers import pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from adapters.gguf import chat_template_from_gguf, config_from_gguf, stop_ids_from_gguf
from adapters.weights import read_weights, weight_names
from registry.checkpoint import Checkpoint, read_checkpoint
from registry.errors import CheckpointError, UnsupportedModelError
from tests.fakes.tiny_gguf import byte_level_metadata, tensors_of, train_byte_level, write_gguf

_SIZES: dict[str, Any] = {
    "vocab_size": 400,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
    "rms_norm_eps": 1e-5,
}
_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _SIZES),
    "llama tied": ("llama", _SIZES | {"tie_word_embeddings": True}),
    "llama biases": ("llama", _SIZES | {"attention_bias": True, "mlp_bias": True}),
    "llama head size": ("llama", _SIZES | {"head_dim": 16}),
    "qwen2": ("qwen2", _SIZES | {"rms_norm_eps": 1e-6}),
    "qwen3": ("qwen3", _SIZES | {"head_dim": 24, "tie_word_embeddings": True}),
    "olmo2": ("olmo2", _SIZES),
    "gpt2": ("gpt2", {"vocab_size": 400, "n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 256}),
}


def _model(name: str) -> Any:
    architecture, settings = _CONFIGS[name]
    torch.manual_seed(0)
    config = AutoConfig.for_model(architecture, **settings)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms too, so that a wrong one shows
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def _metadata(model: Any, architecture: str) -> dict[str, Any]:
    config = model.config
    numbers: dict[str, Any] = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": getattr(config, "intermediate_size", 4 * config.hidden_size),
        "attention.head_count": config.num_attention_heads,
    }
    if architecture == "gpt2":
        numbers["attention.layer_norm_epsilon"] = config.layer_norm_epsilon
    else:
        numbers |= {
            "attention.head_count_kv": config.num_key_value_heads,
            "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
            "rope.freq_base": config.rope_parameters["rope_theta"],
        }
        if getattr(config, "head_dim", None) is not None:
            numbers |= {"attention.key_length": config.head_dim, "attention.value_length": config.head_dim}
    return {f"{architecture}.{key}": value for key, value in numbers.items()}


def _write(path: Path, name: str, extra: dict[str, Any] | None = None, dtype: str = "F32") -> tuple[Any, Checkpoint]:
    model = _model(name)
    architecture = _CONFIGS[name][0]
    permuted = {}
    if architecture == "llama":
        permuted = {"q_proj": model.config.num_attention_heads, "k_proj": model.config.num_key_value_heads}
    tensors = tensors_of(model, architecture, permuted_heads=permuted)
    vocabulary = byte_level_metadata(train_byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False)), "gpt-2")
    metadata = _metadata(model, architecture) | vocabulary | (extra or {})
    write_gguf(path / "tiny.gguf", architecture, metadata, tensors, dtype=dtype)
    return model, read_checkpoint(path / "tiny.gguf")


@pytest.mark.parametrize("name", list(_CONFIGS))
def test_a_model_comes_back_exactly(tmp_path: Path, name: str) -> None:
    original, checkpoint = _write(tmp_path, name)
    config = config_from_gguf(checkpoint)
    weights = dict(read_weights(checkpoint, config))
    assert sorted(weights) == sorted(weight_names(checkpoint))

    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=torch.float32).eval()
    missing, unexpected = model.load_state_dict(weights, strict=False)
    tied = {"lm_head.weight"} if original.config.tie_word_embeddings else set()
    assert (set(missing), set(unexpected)) == (tied, set())
    model.tie_weights()
    assert type(model) is type(original)
    ids = torch.randint(0, 400, (1, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, original(ids).logits, rtol=0, atol=0)


def test_quantized_weights_are_dequantized_before_rows_are_reordered(tmp_path: Path) -> None:
    settings = {"hidden_size": 64, "intermediate_size": 96}
    _CONFIGS["llama blocks"] = ("llama", _SIZES | settings)
    try:
        original, checkpoint = _write(tmp_path, "llama blocks", dtype="Q8_0")
    finally:
        del _CONFIGS["llama blocks"]
    config = config_from_gguf(checkpoint)
    assert config["dtype"] == "bfloat16"
    for name, weight in read_weights(checkpoint, config):
        torch.testing.assert_close(weight, original.state_dict()[name], rtol=0.02, atol=0.01)


def test_config_of_the_small_model(smollm2_gguf: Path) -> None:
    checkpoint = read_checkpoint(smollm2_gguf)
    config = config_from_gguf(checkpoint)
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert (config["num_hidden_layers"], config["hidden_size"], config["intermediate_size"]) == (30, 576, 1536)
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]) == (9, 3, 64)
    assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": 100000.0}
    assert (config["max_position_embeddings"], config["vocab_size"]) == (8192, 49152)
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (1, 2, 2)
    assert config["rms_norm_eps"] == 1e-5
    assert config["tie_word_embeddings"] is True
    assert stop_ids_from_gguf(checkpoint) == (2,)
    assert "<|im_start|>" in (chat_template_from_gguf(checkpoint) or "")


_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def _with_rope_table(tmp_path: Path, divisors: np.ndarray) -> Checkpoint:
    model = _model("llama")
    metadata = _metadata(model, "llama") | {"llama.rope.freq_base": 500000.0}
    tensors = tensors_of(model, "llama", permuted_heads={"q_proj": 4, "k_proj": 2})
    tensors["rope_freqs.weight"] = divisors.astype(np.float32)
    return read_checkpoint(write_gguf(tmp_path / "rope.gguf", "llama", metadata, tensors))


def test_llama3_frequencies_become_rope_parameters(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(**_SIZES | {"rope_parameters": _LLAMA3 | {}})
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config)
    plain = 500000.0 ** -(torch.arange(0, 12, 2).float() / 12)
    checkpoint = _with_rope_table(tmp_path, (plain / scaled).numpy())
    rebuilt = config_from_gguf(checkpoint)
    assert rebuilt["rope_parameters"] == pytest.approx(_LLAMA3)
    assert "rope_freqs" not in " ".join(weight_names(checkpoint))


def test_other_frequency_tables_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="rope_freqs"):
        config_from_gguf(_with_rope_table(tmp_path, np.linspace(1, 8, 6)))


@pytest.mark.parametrize(
    ("keys", "rope"),
    [
        (
            {"type": "yarn", "factor": 4.0, "original_context_length": 64},
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 100000.0},
        ),
        ({"type": "linear", "factor": 2.0}, {"rope_type": "linear", "factor": 2.0, "rope_theta": 100000.0}),
        ({"type": "none"}, {"rope_type": "default", "rope_theta": 100000.0}),
    ],
)
def test_rope_scaling(tmp_path: Path, keys: dict[str, Any], rope: dict[str, Any]) -> None:
    _, checkpoint = _write(tmp_path, "llama", {f"llama.rope.scaling.{key}": value for key, value in keys.items()})
    config = config_from_gguf(checkpoint)
    assert config["rope_parameters"] == rope
    assert AutoConfig.for_model(**config).rope_parameters == rope


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"llama.attention.sliding_window": 64}, r"llama\.attention\.sliding_window"),
        ({"llama.expert_count": 8}, r"llama\.expert_count"),
        ({"llama.logit_scale": 0.5}, r"llama\.logit_scale"),
        ({"llama.rope.scaling.type": "longrope", "llama.rope.scaling.factor": 2.0}, "longrope"),
        ({"llama.rope.dimension_count": 6}, r"rope\.dimension_count"),
        ({"general.type": "adapter"}, "adapter"),
    ],
)
def test_settings_that_change_inference_are_refused(tmp_path: Path, extra: dict[str, Any], message: str) -> None:
    _, checkpoint = _write(tmp_path, "llama", extra)
    with pytest.raises(UnsupportedModelError, match=message):
        config_from_gguf(checkpoint)


def test_neutral_settings_are_accepted(tmp_path: Path) -> None:
    _, checkpoint = _write(tmp_path, "llama", {"llama.expert_count": 0, "llama.rope.dimension_count": 12})
    assert config_from_gguf(checkpoint)["head_dim"] == 12


def test_other_architectures_are_named(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", "mamba", {}, {"token_embd.weight": np.zeros((4, 4), np.float32)})
    with pytest.raises(UnsupportedModelError, match="'mamba'"):
        config_from_gguf(read_checkpoint(path))


def test_a_missing_number_and_a_foreign_tensor_are_named(tmp_path: Path) -> None:
    tensors = {"token_embd.weight": np.zeros((4, 8), np.float32)}
    path = write_gguf(tmp_path / "m.gguf", "llama", {"llama.attention.head_count": 2}, tensors)
    with pytest.raises(CheckpointError, match="embedding_length"):
        config_from_gguf(read_checkpoint(path))
    path = write_gguf(
        tmp_path / "n.gguf", "llama", {}, tensors | {"blk.0.ffn_gate_inp.weight": np.zeros((4, 8), np.float32)}
    )
    with pytest.raises(CheckpointError, match="ffn_gate_inp"):
        list(read_weights(read_checkpoint(path), {}))


def test_biases_that_the_model_class_lacks_are_refused(tmp_path: Path) -> None:
    model = _model("llama")
    tensors = tensors_of(model, "llama", permuted_heads={"q_proj": 4, "k_proj": 2})
    tensors["blk.0.attn_q.bias"] = np.zeros(48, np.float32)
    path = write_gguf(tmp_path / "m.gguf", "llama", _metadata(model, "llama"), tensors)
    with pytest.raises(UnsupportedModelError, match="attn_q"):
        config_from_gguf(read_checkpoint(path))


def test_stop_ids_come_from_the_file_and_from_end_of_turn_tokens(tmp_path: Path) -> None:
    _, plain = _write(tmp_path, "llama", {"tokenizer.ggml.eos_token_id": 0})
    assert stop_ids_from_gguf(plain) == (0,)
    assert chat_template_from_gguf(plain) is None
    _, chat = _write(tmp_path, "llama", {"tokenizer.ggml.eos_token_id": 0, "tokenizer.chat_template": "{{ messages }}"})
    assert stop_ids_from_gguf(chat) == (0, 2)  # <|im_end|> as well

"""What is read from PEFT's files computes what PEFT computes, for every kind of adapter and model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import IA3Config, LoraConfig
from safetensors.torch import save_file
from torch import nn

from delta.peft.adapter_files import open_tensors, read_content
from delta.peft.reader import read_peft_adapter
from delta.variant_terms import VariantTerms
from registry.errors import CheckpointError
from tests.fakes.peft_adapters import TinyBase, load_with_peft, make_adapter, merged_model
from tests.fakes.tiny_models import build_tiny_model

_PROMPT = torch.arange(3, 3 + 20)[None]


def _logits(model: nn.Module, ids: torch.Tensor = _PROMPT) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits[0]


def _check(model_name: str, config: object, path: Path, **save: object) -> VariantTerms:
    """Read, merge and compare with PEFT before and after its own round trip; the greedy tokens of 8 steps, too."""
    model = build_tiny_model(model_name)
    adapted = make_adapter(model, config, path, **save)
    terms = read_peft_adapter(path, TinyBase(model))
    merged = merged_model(model, terms)
    expected = _logits(adapted)
    assert not torch.allclose(expected, _logits(model), atol=1e-2), "the adapter changes nothing"
    torch.testing.assert_close(_logits(merged), expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(_logits(load_with_peft(model, path)), expected, atol=1e-4, rtol=0)
    ids = [_PROMPT, _PROMPT]
    for _ in range(8):
        chosen = [_logits(each, tokens)[-1].argmax() for each, tokens in zip((adapted, merged), ids, strict=True)]
        assert chosen[0] == chosen[1]
        ids = [torch.cat((tokens, token.view(1, 1)), dim=1) for tokens, token in zip(ids, chosen, strict=True)]
    return terms


def _lora(**fields: object) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM", "target_modules": "all-linear"} | fields)


@pytest.mark.parametrize(
    "model_name",
    ["llama", "qwen2", "qwen3", "gpt2", "gpt_neox", "bloom", "falcon-new-arch", "falcon-multi-query", "phi3", "opt"],
)
def test_lora_on_all_linears(model_name: str, tmp_path: Path) -> None:
    terms = _check(model_name, _lora(), tmp_path)
    assert terms.max_rank == 4
    assert terms.adds_only


_ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.mark.parametrize(
    ("model_name", "fields"),
    [
        ("llama", {"use_rslora": True}),
        (
            "llama",
            {"rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\..*": 7}, "alpha_pattern": {"v_proj": 3, "k_proj": 5}},
        ),
        ("llama", {"rank_pattern": {"down_proj": 9}, "use_rslora": True}),
        ("llama", {"target_modules": _ALL, "layers_to_transform": [1]}),
        ("gpt2", {"target_modules": ["c_attn", "c_fc"], "layers_to_transform": 0, "layers_pattern": "h"}),
        ("llama", {"target_modules": _ALL, "exclude_modules": ["k_proj", "layers.0.mlp.up_proj"]}),
        (
            "llama",
            {"target_modules": r".*layers\.\d\.(self_attn|mlp)\..*(q|up)_proj", "exclude_modules": ".*0.*q_proj"},
        ),
        ("llama", {"target_modules": ["model.layers.0.self_attn.q_proj", "down_proj"]}),
        ("gpt2", {"fan_in_fan_out": True}),
        ("llama", {"init_lora_weights": "orthogonal", "lora_dropout": 0.1}),
        ("llama", {"init_lora_weights": "mica"}),
    ],
)
def test_patterns_of_lora(model_name: str, fields: dict[str, object], tmp_path: Path) -> None:
    _check(model_name, _lora(**fields), tmp_path)


@pytest.mark.parametrize(
    ("model_name", "fields"),
    [
        ("llama", {}),
        ("llama", {"use_rslora": True, "rank_pattern": {"q_proj": 2}}),
        ("qwen2", {}),
        ("gpt2", {}),
        ("phi3", {}),
        ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
        ("llama", {"target_modules": ["lm_head", "q_proj"]}),
        ("gpt2", {"target_modules": ["wte", "c_proj"]}),
    ],
)
def test_dora(model_name: str, fields: dict[str, object], tmp_path: Path) -> None:
    terms = _check(model_name, _lora(use_dora=True, **fields), tmp_path)
    assert not terms.adds_only


@pytest.mark.parametrize(
    ("model_name", "targets", "fields"),
    [
        ("llama", ["embed_tokens"], {}),
        ("llama", ["lm_head"], {}),
        ("llama", ["embed_tokens", "lm_head", "q_proj"], {"rank_pattern": {"lm_head": 6}}),
        ("llama-tied", ["embed_tokens", "q_proj"], {}),
        ("llama-tied", ["lm_head", "q_proj"], {}),
        ("llama-tied", ["embed_tokens", "lm_head"], {}),
        ("llama-tied", ["embed_tokens", "q_proj"], {"ensure_weight_tying": True}),
        ("gpt2", ["wte", "wpe", "c_attn"], {}),
        ("gpt_neox", ["embed_in", "embed_out"], {}),
        ("gemma3_text", ["embed_tokens", "v_proj"], {}),
    ],
)
@pytest.mark.parametrize("save_embedding_layers", [True, False])
def test_embeddings_and_heads(
    model_name: str, targets: list[str], fields: dict[str, object], save_embedding_layers: bool, tmp_path: Path
) -> None:
    config = _lora(target_modules=targets, **fields)
    _check(model_name, config, tmp_path, save_embedding_layers=save_embedding_layers)


@pytest.mark.parametrize(
    ("model_name", "fields"),
    [
        ("llama", {"modules_to_save": ["lm_head"]}),
        ("llama", {"modules_to_save": ["embed_tokens", "lm_head", "model.norm"]}),
        ("llama", {"modules_to_save": ["norm"]}),
        ("llama", {"modules_to_save": ["mlp"], "target_modules": ["q_proj"]}),
        ("llama-tied", {"modules_to_save": ["embed_tokens"]}),
        ("llama-tied", {"modules_to_save": ["lm_head"]}),
        ("llama-tied", {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
        ("phi", {"modules_to_save": ["lm_head", "input_layernorm"]}),
        ("gpt2", {"modules_to_save": ["c_fc", "ln_f"], "target_modules": ["c_attn"]}),
        ("qwen3", {"modules_to_save": ["q_norm"]}),
        ("qwen3_moe", {"modules_to_save": ["experts", "mlp.gate"], "target_modules": ["q_proj"]}),
        ("gemma3_text", {"modules_to_save": ["embed_tokens"]}),
    ],
)
def test_modules_that_are_saved_whole(model_name: str, fields: dict[str, object], tmp_path: Path) -> None:
    _check(model_name, _lora(**fields), tmp_path)


@pytest.mark.parametrize(
    ("model_name", "indices", "fields"),
    [
        ("llama", [9, 3, 127], {}),
        ("llama-tied", [9, 3, 127], {}),
        ("llama-tied", {"embed_tokens": [9, 3], "lm_head": [9, 3]}, {}),
        ("llama-tied", {"embed_tokens": [9, 3], "lm_head": [4]}, {}),
        ("llama-tied", {"lm_head": [4, 5]}, {}),
        ("llama", {"embed_tokens": [9, 3], "lm_head": [100, 4]}, {}),
        ("llama", {"lm_head": list(range(60))}, {}),
        ("gpt2", {"wte": [5, 4]}, {}),
        ("gemma3_text", [5, 4], {}),
    ],
)
def test_trained_tokens(model_name: str, indices: object, fields: dict[str, object], tmp_path: Path) -> None:
    _check(model_name, _lora(trainable_token_indices=indices, **fields), tmp_path)


@pytest.mark.parametrize(
    ("model_name", "fields"),
    [
        ("llama", {"lora_bias": True}),
        ("gpt2", {"lora_bias": True, "use_rslora": True}),
        ("qwen2", {"bias": "lora_only"}),
        ("qwen2", {"bias": "all", "target_modules": ["q_proj", "o_proj"]}),
        ("gpt2", {"bias": "all"}),
        ("phi", {"bias": "all", "target_modules": ["q_proj"]}),
        ("opt", {"bias": "lora_only", "lora_bias": True}),
    ],
)
def test_biases(model_name: str, fields: dict[str, object], tmp_path: Path) -> None:
    _check(model_name, _lora(**fields), tmp_path)


_FUSED = ["experts.gate_up_proj", "experts.down_proj"]


@pytest.mark.parametrize(
    ("model_name", "fields"),
    [
        ("qwen3_moe", {"target_parameters": _FUSED}),
        ("qwen3_moe", {"target_parameters": ["experts.down_proj"], "use_rslora": True}),
        ("qwen3_moe", {"target_parameters": [*_FUSED, "gate.weight"], "target_modules": ["q_proj"]}),
        ("qwen3_moe", {"target_parameters": _FUSED, "rank_pattern": {r"experts\.down_proj": 3}, "target_modules": []}),
        ("mixtral", {"target_parameters": ["gate_up_proj", "gate.weight"], "target_modules": ["v_proj"]}),
        ("qwen2_moe", {"target_parameters": _FUSED, "target_modules": ["q_proj"]}),
        ("gpt_oss", {"target_parameters": _FUSED, "target_modules": ["q_proj"]}),
        ("llama4-chunked", {"target_parameters": _FUSED, "target_modules": ["q_proj"]}),
        ("deepseek_v3", {"target_parameters": _FUSED, "target_modules": ["o_proj"]}),
        ("llama", {"target_parameters": ["q_proj.weight", "lm_head.weight"], "target_modules": []}),
        ("mixtral", {"target_modules": ["w1", "w2", "w3", "q_proj"]}),
        ("qwen3_moe", {"target_modules": ["gate_proj", "up_proj", "down_proj", "v_proj"], "use_rslora": True}),
    ],
)
def test_parameters_that_are_targets(model_name: str, fields: dict[str, object], tmp_path: Path) -> None:
    _check(model_name, _lora(**fields), tmp_path)


@pytest.mark.parametrize(
    ("model_name", "fields"),
    [
        ("llama", {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}),
        ("llama-tied", {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}),
        ("gpt2", {"target_modules": ["c_attn", "mlp.c_proj"], "feedforward_modules": ["mlp.c_proj"]}),
        ("bloom", {"target_modules": ["query_key_value", "dense_4h_to_h"], "feedforward_modules": ["dense_4h_to_h"]}),
        ("llama", {}),
        ("llama", {"target_modules": ["k_proj"], "feedforward_modules": [], "modules_to_save": ["lm_head", "norm"]}),
    ],
)
def test_ia3(model_name: str, fields: dict[str, object], tmp_path: Path) -> None:
    _check(model_name, IA3Config(task_type="CAUSAL_LM", **fields), tmp_path)


def test_a_pickled_file_is_read_too(tmp_path: Path) -> None:
    _check("llama", _lora(), tmp_path, safe_serialization=False)
    assert (tmp_path / "adapter_model.bin").exists()


@pytest.mark.parametrize(
    ("model_name", "module", "projections", "router"),
    [
        ("mixtral", "block_sparse_moe", ("w1", "w3", "w2"), True),
        ("qwen3_moe", "mlp", ("gate_proj", "up_proj", "down_proj"), False),
    ],
)
def test_experts_from_before_transformers_5(
    model_name: str, module: str, projections: tuple[str, str, str], router: bool, tmp_path: Path
) -> None:
    """A pair of matrices for each projection of each expert, as PEFT itself converts them."""
    model = build_tiny_model(model_name)
    targets = [*projections, "v_proj", *(["gate"] if router else [])]
    shapes = {"model.layers.{}.self_attn.v_proj": (16 if router else 32, 32)}
    if router:
        shapes[f"model.layers.{{}}.{module}.gate"] = (4, 32)
    width = 48 if model_name == "mixtral" else 24
    for expert in range(4):
        for projection in projections:
            down = projection == projections[2]
            shapes[f"model.layers.{{}}.{module}.experts.{expert}.{projection}"] = (32, width) if down else (width, 32)
    weights = {}
    torch.manual_seed(0)
    for layer in range(2):
        for name, (num_rows, num_columns) in shapes.items():
            path = f"base_model.model.{name.format(layer)}"
            weights[f"{path}.lora_A.weight"] = torch.randn(3, num_columns) * 0.3
            weights[f"{path}.lora_B.weight"] = torch.randn(num_rows, 3) * 0.3
    save_file(weights, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 4, "target_modules": targets, "task_type": "CAUSAL_LM"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    terms = read_peft_adapter(tmp_path, TinyBase(model))
    expected = _logits(load_with_peft(model, tmp_path))
    assert not torch.allclose(expected, _logits(model), atol=1e-2)
    torch.testing.assert_close(_logits(merged_model(model, terms)), expected, atol=1e-4, rtol=0)


def test_a_file_that_is_cut_short_while_it_is_read(tmp_path: Path) -> None:
    file = tmp_path / "adapter_model.safetensors"
    save_file({"base_model.model.x.lora_A.weight": torch.ones(1 << 20)}, file)
    content = read_content(file)
    assert torch.equal(open_tensors(content).take("x.lora_A.weight", (1 << 20,)), torch.ones(1 << 20))
    tensors = open_tensors(content._replace(data=content.data[: 1 << 12]))
    with pytest.raises(CheckpointError, match="cannot be read"):
        tensors.take("x.lora_A.weight", (1 << 20,))

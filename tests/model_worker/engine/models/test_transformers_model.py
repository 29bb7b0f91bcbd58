"""What the dry run and the checks before it refuse: models that would run and give wrong tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from model_worker.engine.layers.linear import Linear
from model_worker.engine.loader import load_model
from model_worker.engine.models.attention_interface import ATTRIBUTE
from model_worker.engine.models.patches.alibi import alibi_slopes
from model_worker.engine.models.transformers_model import TransformersModel
from registry.errors import UnsupportedModelError
from tests.fakes.tiny_models import TINY_MODELS, build_tiny_model, make_tiny_plan

CPU = torch.device("cpu")


def _filled(config: dict[str, Any]) -> TransformersModel:
    """A model with all weights zero, not finished."""
    model = TransformersModel(config, dtype=torch.float32, device=CPU, max_model_len=64)
    for name, tensor in list(model.weights()):
        model.fill(name, torch.zeros_like(tensor, device=CPU))
    return model


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "gptj", "n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 8, "vocab_size": 64},
        {"model_type": "gpt_neo", "hidden_size": 32, "num_layers": 2, "num_heads": 4, "vocab_size": 64,
         "attention_types": [[["global", "local"], 1]]},
        {"model_type": "codegen", "n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 8, "vocab_size": 64},
    ],
    ids=lambda config: config["model_type"],
)  # fmt: skip
def test_a_model_that_goes_its_own_way_is_refused(config: dict[str, Any]) -> None:
    model = _filled(config)
    with pytest.raises(UnsupportedModelError, match=r"called the attention interface 0 times|is not implemented"):
        model.finish()


def test_dynamic_rope_is_refused() -> None:
    config = {**_llama_config(), "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}
    with pytest.raises(UnsupportedModelError, match="'dynamic' makes answers depend on other requests"):
        TransformersModel(config, dtype=torch.float32, device=CPU, max_model_len=64)


def test_longrope_is_refused_beyond_its_first_length(tmp_path: Path) -> None:
    build_tiny_model("phi3-longrope").save_pretrained(tmp_path)
    original = 256
    load_model(make_tiny_plan(tmp_path, max_model_len=original), CPU)
    with pytest.raises(UnsupportedModelError, match=f"--max-model-len {original}"):
        load_model(make_tiny_plan(tmp_path, max_model_len=original + 1), CPU)


def _llama_config() -> dict[str, Any]:
    return {
        "model_type": "llama", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    }  # fmt: skip


def _call_twice(model: Any) -> None:
    first = model.causal_lm.model.layers[0].self_attn
    forward = first.forward
    first.forward = lambda *args, **kwargs: (forward(*args, **kwargs), forward(*args, **kwargs))[0]


def _share_a_layer(model: Any) -> None:
    layers = model.causal_lm.model.layers
    layers[1] = layers[0]


def _scale_logits(model: Any) -> None:
    head, forward = model.causal_lm, model.causal_lm.forward

    def scaled(*args: Any, **kwargs: Any) -> Any:
        out = forward(*args, **kwargs)
        out.logits = out.logits * 2.0
        return out

    head.forward = scaled


def _mask(model: Any) -> None:
    attention = model.causal_lm.model.layers[0].self_attn
    forward = attention.forward
    attention.forward = lambda *args, **kwargs: forward(*args, **{**kwargs, "attention_mask": torch.ones(1)})


def _unknown_argument(model: Any) -> None:
    attention = model.causal_lm.model.layers[0].self_attn
    forward = attention.forward
    attention.forward = lambda *args, **kwargs: forward(*args, **kwargs, position_bias=torch.ones(1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_call_twice, "2 layers but called the attention interface 3 times"),
        (_share_a_layer, "2 layers but called the attention interface 2 times"),
        (_scale_logits, "treats its logits in a way"),
        (_mask, "attention with attention_mask"),
        (_unknown_argument, "attention with position_bias"),
    ],
)
def test_the_dry_run_notices(change: Callable[[Any], None], message: str) -> None:
    model = _filled(_llama_config())
    for _, tensor in model.weights():
        nn.init.normal_(tensor)
    change(model)
    with pytest.raises(UnsupportedModelError, match=message):
        model.finish()


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss", "deepseek_v3", "llama4-temperature", "falcon-alibi"])
def test_layers_know_their_constants(name: str, tmp_path: Path) -> None:
    build_tiny_model(name).save_pretrained(tmp_path)
    model = load_model(make_tiny_plan(tmp_path), CPU)
    first, second = model.attentions[:2]
    if name == "gemma2":
        assert (first.params.sliding_window, second.params.sliding_window) == (24, None)
        assert first.params.softcap == 5.0
        assert first.params.scale == 24**-0.5
    elif name == "gpt_oss":
        assert first.params.sinks is not None
        assert first.params.sinks.shape == (4,)
    elif name == "deepseek_v3":
        assert (first.kv_shape.key_dim, first.kv_shape.value_dim) == (24, 12)
    elif name == "llama4-temperature":
        assert (first.params.chunk_size, second.params.chunk_size) == (32, None)
        assert first.query_temperature is None
        assert second.query_temperature is not None
    else:
        assert first.params.alibi is second.params.alibi
        assert first.params.alibi is not None


def test_all_linears_are_ours_and_only_attention_modules_hold_an_attention(tmp_path: Path) -> None:
    build_tiny_model("llama").save_pretrained(tmp_path)
    model = load_model(make_tiny_plan(tmp_path), CPU)
    assert not [m for m in model.causal_lm.modules() if isinstance(m, nn.Linear)]
    assert sum(isinstance(m, Linear) for m in model.causal_lm.modules()) == 2 * 7 + 1
    holders = [m for m in model.causal_lm.modules() if hasattr(m, ATTRIBUTE)]
    assert [type(m).__name__ for m in holders] == ["LlamaAttention"] * 2


def test_nothing_stays_on_meta_and_rotary_frequencies_are_those_of_transformers(tmp_path: Path) -> None:
    for name in ("llama-llama3-rope", "gemma3_text"):
        reference = build_tiny_model(name)
        reference.save_pretrained(tmp_path / name)
        model = load_model(make_tiny_plan(tmp_path / name), CPU)
        expected = dict(reference.named_buffers())
        found = dict(model.causal_lm.named_buffers())
        assert found.keys() == expected.keys()
        for key, buffer in found.items():
            assert torch.equal(buffer, expected[key]), key


@pytest.mark.parametrize(
    ("num_heads", "expected"), [(4, [2**-2, 2**-4, 2**-6, 2**-8]), (6, [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3])]
)
def test_alibi_slopes(num_heads: int, expected: list[float]) -> None:
    assert alibi_slopes(num_heads).tolist() == expected


def test_every_tiny_model_names_a_family_of_transformers() -> None:
    for tiny in TINY_MODELS.values():
        assert CONFIG_MAPPING[tiny.model_type] in AutoModelForCausalLM._model_mapping

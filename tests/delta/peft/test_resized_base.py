"""Adapters with tokens that their base does not have: with their terms the base is what PEFT's resized model is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from delta.imports.peft_adapter import AdapterChanges
from delta.peft.reader import read_peft_adapter
from registry.errors import CheckpointError, UnsupportedModelError
from tests.fakes.peft_adapters import TinyBase, make_adapter, merged_model
from tests.fakes.tiny_models import VOCAB_SIZE, build_tiny_model, with_more_tokens

NEW = list(range(VOCAB_SIZE, VOCAB_SIZE + 3))
CASES: dict[str, dict[str, Any]] = {
    "both saved": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "one saved": {"modules_to_save": ["embed_tokens"]},
    "copies": {},
    "low rank": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "dora": {"target_modules": ["q_proj", "embed_tokens", "lm_head"], "use_dora": True},
    "trained rows": {"trainable_token_indices": {"embed_tokens": [5, *NEW], "lm_head": [*NEW, 7]}},
    "the same rows": {"trainable_token_indices": {"embed_tokens": NEW, "lm_head": NEW}},
    "some rows": {"trainable_token_indices": [3, NEW[1]]},
}
"""Fields of the configuration; PEFT saves copies of both tables with all."""


def _make(model: PreTrainedModel, path: Path, **fields: Any) -> nn.Module:
    save_copies = fields.pop("save_embedding_layers", True)
    config = LoraConfig(**{"r": 3, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **fields})
    return make_adapter(with_more_tokens(model, len(NEW)), config, path, save_embedding_layers=save_copies)


def _logits(model: nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=torch.tensor([[1, NEW[0], 5, 7, NEW[2], 3, NEW[1], 2]])).logits


@pytest.mark.parametrize("name", ["llama", "llama-tied"])
@pytest.mark.parametrize("case", CASES)
def test_terms_are_what_the_resized_model_computes(tmp_path: Path, case: str, name: str) -> None:
    model = build_tiny_model(name)
    adapted = _make(model, tmp_path, **CASES[case])
    terms = read_peft_adapter(tmp_path, TinyBase(model))
    assert terms.num_extra_tokens == len(NEW)
    merged = merged_model(model, terms)
    torch.testing.assert_close(_logits(merged), _logits(adapted), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", ["both saved", "the same rows"])
@pytest.mark.parametrize("name", ["llama", "llama-tied"])
def test_without_copies_of_the_tables(tmp_path: Path, case: str, name: str) -> None:
    model = build_tiny_model(name)
    adapted = _make(model, tmp_path, save_embedding_layers=False, **CASES[case])
    merged = merged_model(model, read_peft_adapter(tmp_path, TinyBase(model)))
    torch.testing.assert_close(_logits(merged), _logits(adapted), rtol=1e-4, atol=1e-4)


def test_a_head_with_a_bias_has_to_be_saved(tmp_path: Path) -> None:
    model = build_tiny_model("phi")
    _make(model, tmp_path / "copies")
    with pytest.raises(UnsupportedModelError, match="no bias of lm_head"):
        read_peft_adapter(tmp_path / "copies", TinyBase(model))
    fields = {"modules_to_save": ["embed_tokens", "lm_head"], "save_embedding_layers": False}
    adapted = _make(model, tmp_path / "saved", **fields)
    merged = merged_model(model, read_peft_adapter(tmp_path / "saved", TinyBase(model)))
    torch.testing.assert_close(_logits(merged), _logits(adapted), rtol=1e-4, atol=1e-4)


def test_only_new_tokens_cost_their_rows(tmp_path: Path) -> None:
    model = build_tiny_model("llama-tied")
    _make(model, tmp_path, trainable_token_indices=NEW)
    terms = read_peft_adapter(tmp_path, TinyBase(model))
    head, table = terms.linears["lm_head"], terms.embeddings["model.embed_tokens"]
    assert head.a is None
    assert table.token_ids is None
    assert head.extra_rows is not None
    assert table.extra_rows is not None
    torch.testing.assert_close(head.extra_rows, table.extra_rows)


@pytest.mark.parametrize("case", ["one saved", "some rows"])
def test_rows_that_no_file_has_are_refused(tmp_path: Path, case: str) -> None:
    model = build_tiny_model("llama")
    _make(model, tmp_path, save_embedding_layers=False, **CASES[case])
    with pytest.raises((UnsupportedModelError, CheckpointError), match=r"lacks rows of lm_head|goes to 129"):
        read_peft_adapter(tmp_path, TinyBase(model))


@pytest.mark.parametrize(
    ("case", "twin"),
    [
        ("both saved", "lm_head.modules_to_save.weight"),
        ("both saved", "model.embed_tokens.original_module.weight"),
        ("some rows", "lm_head.token_adapter.trainable_tokens_delta"),
        ("some rows", "model.embed_tokens.token_adapter.base_layer.weight"),
    ],
)
def test_what_is_stored_twice_has_to_be_the_same(tmp_path: Path, case: str, twin: str) -> None:
    model = build_tiny_model("llama-tied")
    _make(model, tmp_path, **CASES[case])
    weights = load_file(tmp_path / "adapter_model.safetensors")
    weights[f"base_model.model.{twin}"][0] += 0.5
    save_file(weights, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"differ|is not the weight of this base"):
        read_peft_adapter(tmp_path, TinyBase(model))


def test_a_merged_model_would_be_of_another_size(tmp_path: Path) -> None:
    model = build_tiny_model("llama")
    _make(model, tmp_path)
    base = TinyBase(model)
    with pytest.raises(UnsupportedModelError, match="3 tokens that this base does not have"):
        AdapterChanges(read_peft_adapter(tmp_path, base), base.shapes)

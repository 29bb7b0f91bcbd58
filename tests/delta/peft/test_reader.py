"""What is read from PEFT's files computes what PEFT computes, for every kind of adapter and model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from torch import nn

from delta.peft.reader import read_peft_adapter
from delta.variant_terms import VariantTerms
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

"""Blocks of a GGUF file that are not dequantized: rows in Hugging Face's order, the numbers of the float32 path."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from adapters.gguf import config_from_gguf
from adapters.load_plan import LoadPlan
from adapters.weights import iterate_weights, read_weights
from compression.gguf import GROUPED_TYPES
from compression.grouped_weight import GroupedWeight
from registry.checkpoint import Checkpoint, read_checkpoint
from tests.delta.models import make
from tests.fakes.load_plans import make_plan
from tests.fakes.tiny_gguf import write_gguf

_METADATA = {
    "llama.context_length": 64,
    "llama.embedding_length": 64,
    "llama.block_count": 1,
    "llama.feed_forward_length": 96,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.vocab_size": 40,
}
_SHAPES = {
    "token_embd.weight": (40, 64),
    "output_norm.weight": (64,),
    "blk.0.attn_q.weight": (64, 64),
    "blk.0.attn_k.weight": (32, 64),
    "blk.0.ffn_down.weight": (64, 96),
    "blk.0.attn_norm.weight": (64,),
}
_QUERY = "model.layers.0.self_attn.q_proj.weight"
_MATRICES = {
    "model.embed_tokens.weight",
    _QUERY,
    "model.layers.0.self_attn.k_proj.weight",
    "model.layers.0.mlp.down_proj.weight",
}


def _tiny(path: Path, dtype: str) -> Checkpoint:
    rng = np.random.default_rng(0)
    tensors = {name: rng.normal(size=shape).astype(np.float32) for name, shape in _SHAPES.items()}
    return read_checkpoint(write_gguf(path / "tiny.gguf", "llama", _METADATA, tensors, dtype=dtype))


def _plan(checkpoint: Checkpoint, kept_types: frozenset[str] = GROUPED_TYPES) -> LoadPlan:
    config = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return dataclasses.replace(make_plan(), checkpoint=checkpoint, config=config, kept_types=kept_types)


@pytest.mark.parametrize("dtype", sorted(GROUPED_TYPES))
def test_they_mean_what_dequantizing_gives(tmp_path: Path, dtype: str) -> None:
    plan = _plan(_tiny(tmp_path, dtype))
    expected = dict(read_weights(plan.checkpoint, plan.config))
    kept = dict(iterate_weights(plan, keep_blocks=True))
    assert kept.keys() == expected.keys()
    assert {name for name, weight in kept.items() if isinstance(weight, GroupedWeight)} == _MATRICES
    for name, weight in kept.items():
        numbers = weight.dequantize() if isinstance(weight, GroupedWeight) else weight
        assert torch.equal(numbers, expected[name]), name


@pytest.mark.parametrize(("dtype", "kept_types"), [("Q8_0", {"Q4_0", "Q4_1"}), ("Q4_1", set()), ("F16", GROUPED_TYPES)])
def test_types_that_the_plan_does_not_keep_are_dequantized(tmp_path: Path, dtype: str, kept_types: set[str]) -> None:
    plan = _plan(_tiny(tmp_path, dtype), frozenset(kept_types))
    assert not any(isinstance(weight, GroupedWeight) for _, weight in iterate_weights(plan, keep_blocks=True))


def test_whoever_does_not_ask_gets_tensors(tmp_path: Path) -> None:
    plan = _plan(_tiny(tmp_path, "Q4_1"))
    assert all(isinstance(weight, torch.Tensor) for _, weight in iterate_weights(plan))


def test_transposed_weights_are_dequantized(tmp_path: Path) -> None:
    """GPT-2's groups would run along its outputs."""
    tensors = {"blk.0.ffn_up.weight": np.random.default_rng(0).normal(size=(64, 32)).astype(np.float32)}
    checkpoint = read_checkpoint(write_gguf(tmp_path / "tiny.gguf", "gpt2", {}, tensors, dtype="Q8_0"))
    ((_, weight),) = iterate_weights(_plan(checkpoint), keep_blocks=True)
    assert isinstance(weight, torch.Tensor)
    assert weight.shape == (32, 64)


def test_deltas_are_added_to_numbers(tmp_path: Path) -> None:
    plan = _plan(_tiny(tmp_path, "Q4_0"))
    base = dict(read_weights(plan.checkpoint, plan.config))
    fine_tune = base | {_QUERY: base[_QUERY] + 1.0}
    for name, weights in (("base", base), ("fine-tune", fine_tune)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        save_file({key: weight.contiguous() for key, weight in weights.items()}, tmp_path / name / "model.safetensors")
    make(tmp_path / "base", tmp_path / "fine-tune", tmp_path / "delta")
    plan = dataclasses.replace(plan, deltas=(tmp_path / "delta",))
    for name, weight in iterate_weights(plan, keep_blocks=True):
        assert isinstance(weight, torch.Tensor)
        assert torch.equal(weight, fine_tune[name]), name


def test_of_the_small_model(smollm2_gguf: Path) -> None:
    checkpoint = read_checkpoint(smollm2_gguf)
    plan = dataclasses.replace(_plan(checkpoint), config=config_from_gguf(checkpoint))
    expected = read_weights(checkpoint, plan.config)
    num_grouped = 0
    for (name, weight), (other_name, tensor) in zip(iterate_weights(plan, keep_blocks=True), expected, strict=True):
        assert name == other_name
        if isinstance(weight, GroupedWeight):
            num_grouped += 1
            weight = weight.dequantize()
        assert torch.equal(weight.view(torch.int32), tensor.view(torch.int32)), name
    assert num_grouped == 211

"""Every tensor of a checkpoint goes to one place and every place gets one tensor, under whatever names."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from model_worker.engine.config import CacheConfig, EngineConfig, SchedulerConfig
from model_worker.engine.loader import load_model
from model_worker.engine.model_runner import ModelRunner
from model_worker.engine.sampling_params import SamplingParams
from model_worker.engine.sequence import Sequence
from model_worker.engine.step import ScheduledSequence, SchedulerOutput
from registry.errors import CheckpointError, UnsupportedModelError
from tests.fakes.tiny_models import build_tiny_model, make_tiny_plan

Weights = dict[str, Tensor]
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def _save(name: str, path: Path, change: Callable[[Weights], None] | None = None) -> Tensor:
    """Save a tiny model with changed tensors. -> logits of the unchanged one for PROMPT, [len, vocab]"""
    model = build_tiny_model(name)
    model.save_pretrained(path)
    if change is not None:
        weights = load_file(path / "model.safetensors")
        change(weights)
        save_file({key: tensor.contiguous() for key, tensor in weights.items()}, path / "model.safetensors")
    with torch.inference_mode():
        logits: Tensor = model(input_ids=torch.tensor([PROMPT])).logits[0]
    return logits


def _assert_loads(path: Path, logits: Tensor) -> None:
    config = EngineConfig(CacheConfig(num_blocks=4), SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=16))
    runner = ModelRunner(make_tiny_plan(path), config)
    sequence = Sequence(0, 0, PROMPT, SamplingParams(prompt_logprobs=0), seed=0)
    sequence.block_table = [2]
    result = runner.execute(SchedulerOutput((ScheduledSequence(sequence, 0, len(PROMPT)),)))
    found = torch.tensor([entry.logprob for entry in result.prompt_logprobs[0]])
    expected = logits.log_softmax(dim=1)[:-1].gather(1, torch.tensor(PROMPT[1:])[:, None]).squeeze(1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def _rename(weights: Weights, old: str, new: str) -> None:
    for name in [name for name in weights if old in name]:
        weights[name.replace(old, new)] = weights.pop(name)


def _add_gpt2_masks(weights: Weights) -> None:
    for name in list(weights):
        assert name.startswith("transformer.")
        weights[name.removeprefix("transformer.")] = weights.pop(name)
    weights["h.0.attn.bias"] = torch.ones(1, 1, 4, 4)
    weights["h.1.attn.masked_bias"] = torch.tensor(-1e4)


def _old_gpt_neox(weights: Weights) -> None:
    assert "embed_out.weight" in weights
    weights["gpt_neox.layers.0.attention.bias"] = torch.ones(1, 1, 4, 4)
    weights["gpt_neox.layers.0.attention.masked_bias"] = torch.tensor(-1e9)
    weights["gpt_neox.layers.0.attention.rotary_emb.inv_freq"] = torch.ones(4)


def _stack_experts(weights: Weights) -> None:
    for layer in range(2):
        prefix = f"model.layers.{layer}.mlp.experts"
        gate_up, down = [], []
        for expert in range(4):
            gate, up = (weights.pop(f"{prefix}.{expert}.{name}.weight") for name in ("gate_proj", "up_proj"))
            gate_up.append(torch.cat((gate, up)))
            down.append(weights.pop(f"{prefix}.{expert}.down_proj.weight"))
        weights[f"{prefix}.gate_up_proj"] = torch.stack(gate_up)
        weights[f"{prefix}.down_proj"] = torch.stack(down)


def _write_head_too(weights: Weights) -> None:
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()


@pytest.mark.parametrize(
    ("name", "change"),
    [
        pytest.param("gpt2", _add_gpt2_masks, id="bare decoder with causal masks"),
        pytest.param("gpt_neox", _old_gpt_neox, id="old names and buffers"),
        pytest.param("mixtral", lambda w: _rename(w, ".mlp.", ".block_sparse_moe."), id="old mixture names"),
        pytest.param("qwen3_moe", _stack_experts, id="experts stacked already"),
        pytest.param("llama-tied", _write_head_too, id="tied weight under both names"),
        pytest.param("llama-tied", lambda w: _rename(w, "model.embed_tokens.", "lm_head."), id="only as head"),
    ],
)
def test_names_of_other_times_are_understood(name: str, change: Callable[[Weights], None], tmp_path: Path) -> None:
    _assert_loads(tmp_path, _save(name, tmp_path, change))


def _give_twice(weights: Weights) -> None:
    weights["lm_head.weight"] = weights["embed_out.weight"].clone()


def _stack_beside(weights: Weights) -> None:
    weights["model.layers.0.mlp.experts.down_proj"] = torch.zeros(4, 32, 24)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "llama",
            lambda w: w.pop("model.layers.1.mlp.up_proj.weight"),
            r"lacks model\.layers\.1\.mlp\.up_proj\.weight",
        ),
        ("llama", lambda w: w.update(surprise=torch.zeros(2)), "'surprise', for which this model has no place"),
        ("llama", lambda w: w.update({"model.norm.weight": torch.zeros(31)}), r"has shape \[31\]"),
        ("gpt_neox", _give_twice, "which are the same weight"),
        (
            "llama-tied",
            lambda w: w.update({"lm_head.weight": torch.zeros(128, 32)}),
            "are tied by config.json but differ",
        ),
        ("qwen3_moe", lambda w: w.pop("model.layers.0.mlp.experts.2.up_proj.weight"), r"gate_up_proj\[2\]"),
        ("qwen3_moe", _stack_beside, "experts.*also parts of it|has 4 experts"),
        (
            "qwen3_moe",
            lambda w: w.update({"model.layers.0.mlp.experts.4.down_proj.weight": torch.zeros(32, 24)}),
            "the model has 4 experts",
        ),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(
    name: str, change: Callable[[Weights], None], message: str, tmp_path: Path
) -> None:
    _save(name, tmp_path, change)
    with pytest.raises(CheckpointError, match=message):
        load_model(make_tiny_plan(tmp_path), torch.device("cpu"))


def test_a_quantized_plan_is_refused(tmp_path: Path) -> None:
    _save("llama", tmp_path)
    with pytest.raises(UnsupportedModelError, match="int4"):
        load_model(dataclasses.replace(make_tiny_plan(tmp_path), quantization="int4"), torch.device("cpu"))


def test_weights_take_the_dtype_of_the_plan(tmp_path: Path) -> None:
    _save("llama", tmp_path)
    model = load_model(make_tiny_plan(tmp_path, dtype="float16"), torch.device("cpu"))
    assert {tensor.dtype for _, tensor in model.weights()} == {torch.float16}


def test_what_loses_too_much_in_half_precision_stays_float32(tmp_path: Path) -> None:
    _save("deepseek_v3", tmp_path)
    model = load_model(make_tiny_plan(tmp_path, dtype="bfloat16"), torch.device("cpu"))
    dtypes = {name: tensor.dtype for name, tensor in model.weights()}
    assert dtypes["model.layers.1.mlp.gate.e_score_correction_bias"] == torch.float32
    assert dtypes["model.norm.weight"] == torch.bfloat16

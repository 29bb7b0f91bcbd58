"""Decode steps that are replayed from captured graphs give the tokens of steps that are launched kernel by kernel."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from tests.fakes.tiny_models import build_tiny_model
from tests.gpu.device import DEVICE
from tests.gpu.engines import generated, greedy, make_llm, random_prompts

NUM_NEW_TOKENS = 40
LENGTHS = (3, 60, 17, 100, 31, 5, 64, 16, 15, 90, 2, 48)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return build_tiny_model("llama-tied")


@pytest.fixture(scope="module")
def path(model: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("model")
    model.save_pretrained(target)
    return target


@pytest.mark.parametrize("max_num_seqs", [1, 3, 12])
def test_batches_of_every_size(model: PreTrainedModel, path: Path, max_num_seqs: int) -> None:
    prompts = random_prompts(LENGTHS)
    on_gpu = model.to(DEVICE)
    expected = [generated(on_gpu, prompt, NUM_NEW_TOKENS) for prompt in prompts]
    model.cpu()
    llm = make_llm(path, max_num_seqs=max_num_seqs)
    for _ in range(2):  # the second time most prompts are found in the cache
        assert greedy(llm, prompts, NUM_NEW_TOKENS) == expected


@pytest.mark.parametrize("name", ["gemma2", "qwen3", "mixtral", "qwen3_moe"])
def test_layers_of_several_kinds(name: str, tmp_path: Path) -> None:
    build_tiny_model(name).save_pretrained(tmp_path)
    prompts = random_prompts(LENGTHS)
    eager = greedy(make_llm(tmp_path, eager=True), prompts, NUM_NEW_TOKENS)
    assert greedy(make_llm(tmp_path), prompts, NUM_NEW_TOKENS) == eager


def test_any_mix_of_adapters(model: PreTrainedModel, path: Path, tmp_path: Path) -> None:
    names = ["a", "b", "c"]
    for number, name in enumerate(names):
        _write_adapter(tmp_path / name, model, rank=(4, 16, 7)[number], seed=number)
    prompts = random_prompts(LENGTHS)
    loras = [None, "a", "b", "a", None, "c", "c", "b", "a", None, "b", "c"]
    found = []
    for eager in (True, False):
        llm = make_llm(path, eager=eager, max_num_seqs=12)
        for name in names:
            llm.add_lora(name, tmp_path / name)
        found.append(greedy(llm, prompts, NUM_NEW_TOKENS, loras))
    assert found[0] == found[1]
    assert found[0] != greedy(make_llm(path), prompts, NUM_NEW_TOKENS)


def test_adapters_that_change_experts_have_no_graphs(tmp_path: Path) -> None:
    """Beside those that do not, and the base: they are what they are when they come alone."""
    model = build_tiny_model("mixtral")
    model.save_pretrained(tmp_path / "base")
    _write_adapter(tmp_path / "attention", model, rank=4, seed=1)
    down_projections = {
        f"model.layers.{layer}.block_sparse_moe.experts.{expert}.w2": (32, 48)
        for layer in (0, 1)
        for expert in range(4)
    }
    _write(tmp_path / "experts", down_projections, rank=2, seed=2)
    prompts = random_prompts(LENGTHS)
    names = ["experts", "attention"]
    loras = [None, "experts", "attention", "experts", None, "attention"] * 2
    llm = make_llm(tmp_path / "base", max_num_seqs=12)
    for name in names:
        llm.add_lora(name, tmp_path / name)
    together = greedy(llm, prompts, NUM_NEW_TOKENS, loras)
    for row in (0, 1, 2):
        assert together[row] == greedy(llm, [prompts[row]], NUM_NEW_TOKENS, [loras[row]])[0]
    assert together[1] != greedy(llm, [prompts[1]], NUM_NEW_TOKENS)[0]


def _write_adapter(directory: Path, model: PreTrainedModel, rank: int, seed: int) -> None:
    """A LoRA adapter in PEFT's format, of all linear layers of the decoder."""
    linears = {
        name: (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and "layers" in name
    }
    _write(directory, linears, rank, seed)


def _write(directory: Path, shapes: Mapping[str, tuple[int, int]], rank: int, seed: int) -> None:
    directory.mkdir()
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (num_outputs, num_inputs) in shapes.items():
        key = f"base_model.model.{name}.lora_"
        tensors[f"{key}A.weight"] = torch.randn(rank, num_inputs, generator=generator) * 0.3
        tensors[f"{key}B.weight"] = torch.randn(num_outputs, rank, generator=generator) * 0.3
    save_file(tensors, directory / "adapter_model.safetensors")
    targets = sorted({name.split(".lora_")[0].rpartition(".")[2] for name in tensors})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": targets, "bias": "none"}
    (directory / "adapter_config.json").write_text(json.dumps(config))

"""Decode steps that are replayed from captured graphs give the tokens of steps that are launched kernel by kernel."""

from __future__ import annotations

import json
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


@pytest.mark.parametrize("name", ["gemma2", "qwen3"])
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


def _write_adapter(directory: Path, model: PreTrainedModel, rank: int, seed: int) -> None:
    """A LoRA adapter in PEFT's format, of all linear layers of the decoder."""
    directory.mkdir()
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and "layers" in name:
            key = f"base_model.model.{name}.lora_"
            tensors[f"{key}A.weight"] = torch.randn(rank, module.in_features, generator=generator) * 0.3
            tensors[f"{key}B.weight"] = torch.randn(module.out_features, rank, generator=generator) * 0.3
    save_file(tensors, directory / "adapter_model.safetensors")
    targets = sorted({name.split(".lora_")[0].rpartition(".")[2] for name in tensors})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": targets, "bias": "none"}
    (directory / "adapter_config.json").write_text(json.dumps(config))

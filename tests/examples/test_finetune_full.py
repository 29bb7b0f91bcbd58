"""`examples/finetune_full.py`: trains a tiny model and saves it as people save models."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file

from registry.companion_files import companion_files

PAIRS = [("Hello?", "Ahoy!"), ("Yes?", "No."), ("How?", "So."), ("Why?", "It is so.")]


@pytest.fixture
def full(example: Callable[[str], ModuleType]) -> ModuleType:
    return example("finetune_full")


def test_all_weights_are_trained_and_saved_as_bfloat16(full: ModuleType, tiny_dir: Path, tmp_path: Path) -> None:
    directory = tmp_path / "fine-tune"
    files = []
    for seed in (7, 7, 8):
        training = full.Training(steps=3, seed=seed, learning_rate=3e-2)
        losses = full.train_model(tiny_dir, PAIRS, training, directory, print)
        assert losses[-1] < losses[0]
        files.append((directory / "model.safetensors").read_bytes())
        assert (directory / "model.safetensors").stat().st_mode & 0o444 == 0o444
    assert files[0] == files[1] != files[2]
    base, tuned = load_file(tiny_dir / "model.safetensors"), load_file(directory / "model.safetensors")
    assert base.keys() == tuned.keys()
    for name, weight in tuned.items():
        assert weight.dtype is torch.bfloat16
        assert not torch.equal(weight, base[name].bfloat16()), name
    assert {name: file.read_bytes() for name, file in companion_files(directory).items()} == {
        name: file.read_bytes() for name, file in companion_files(tiny_dir).items()
    }


def test_it_answers_by_itself(full: ModuleType, tiny_dir: Path) -> None:
    model, tokenizer = full.load(tiny_dir)
    assert full.answer(model, tokenizer, "Hello?") == full.answer(model, tokenizer, "Hello?")

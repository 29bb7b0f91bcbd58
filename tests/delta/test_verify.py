"""Three levels of verification."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from delta.verify import Level, check_target, verify_delta
from registry.errors import CheckpointError
from tests.delta.models import base_weights, save

_LEVELS: tuple[Level, ...] = ("header", "sampled", "full")


@pytest.mark.parametrize("level", _LEVELS)
def test_a_whole_delta(base: Path, delta: Path, level: Level) -> None:
    verify_delta(delta, level=level)
    verify_delta(delta, base, level=level)


def test_damaged_data(base: Path, delta: Path) -> None:
    file = delta / "delta.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    verify_delta(delta, base, level="header")
    for level in ("sampled", "full"):
        for of in (None, base):
            with pytest.raises(CheckpointError, match="damaged"):
                verify_delta(delta, of, level=level)


@pytest.mark.parametrize("level", _LEVELS)
def test_a_cut_file(delta: Path, level: Level) -> None:
    file = delta / "delta.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"truncated|does not"):
        verify_delta(delta, level=level)


def test_another_base(tmp_path: Path, delta: Path) -> None:
    weights = base_weights()
    weights["embed"][0, 0] += 1
    other = save(tmp_path / "other", weights, tokenizer='{"v": 1}', generation_config="{}")
    verify_delta(delta, other, level="header")
    for level in ("sampled", "full"):
        with pytest.raises(CheckpointError, match="another base model"):
            verify_delta(delta, other, level=level)
    del weights["embed"]
    fewer = save(tmp_path / "fewer", weights)
    with pytest.raises(CheckpointError, match="another base model"):
        verify_delta(delta, fewer, level="header")


def test_small_files(base: Path, delta: Path) -> None:
    (delta / "files" / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="damaged"):
        verify_delta(delta, level="header")
    (delta / "files" / "tokenizer.json").unlink()
    verify_delta(delta, level="header")
    with pytest.raises(CheckpointError, match="base's file is missing or was changed"):
        verify_delta(delta, base, level="header")
    (delta / "files" / "evil.json").write_text("{}")
    with pytest.raises(CheckpointError, match="does not belong"):
        verify_delta(delta, level="header")


def test_stored_tensors_of_another_delta(delta: Path) -> None:
    file = delta / "delta.safetensors"
    tensors = load_file(file)
    tensors["norm/0/tensor"] += 1
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match="damaged"):
        verify_delta(delta)


def test_the_fine_tune_that_it_was_made_of(delta: Path, target: Path) -> None:
    check_target(delta, target)
    (target / "tokenizer.json").write_text('{"v": 3}')
    with pytest.raises(CheckpointError, match="was not made of"):
        check_target(delta, target)
    (target / "tokenizer.json").write_text('{"v": 2}')
    check_target(delta, target)
    weights = load_file(target / "model.safetensors")
    weights["up"][0, 0] += 1
    save_file(weights, target / "model.safetensors")
    with pytest.raises(CheckpointError, match="was not made of"):
        check_target(delta, target)

"""Applying a delta on disk: files, dtypes, shards, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from delta.apply import apply_delta
from registry.checkpoint import read_checkpoint
from registry.digest import base_digest
from registry.errors import CheckpointError, InvalidRequestError
from tests.delta.models import SIGN, base_weights, make, save


def test_the_fine_tune_comes_back_with_its_files(tmp_path: Path, base: Path, target: Path, delta: Path) -> None:
    apply_delta(base, delta, tmp_path / "back", max_shard_bytes=300)
    assert base_digest(read_checkpoint(tmp_path / "back")) == base_digest(read_checkpoint(target))
    names = {file.name for file in (tmp_path / "back").iterdir() if "safetensors" not in file.name}
    assert names == {"config.json", "tokenizer.json", "generation_config.json"}
    assert (tmp_path / "back" / "tokenizer.json").read_text() == '{"v": 2}'
    assert len(list((tmp_path / "back").glob("model-*.safetensors"))) > 1


def test_in_another_dtype(tmp_path: Path, base: Path, target: Path, delta: Path) -> None:
    apply_delta(base, delta, tmp_path / "back", dtype=torch.float16)
    back, expected = load_file(tmp_path / "back" / "model.safetensors"), load_file(target / "model.safetensors")
    assert {tensor.dtype for tensor in back.values()} == {torch.float16, torch.int64}
    assert torch.equal(back["down"], expected["down"].half())


@pytest.mark.parametrize("change", ["changed", "missing", "extra"])
def test_another_base_is_refused(tmp_path: Path, delta: Path, change: str) -> None:
    weights = base_weights()
    if change == "changed":
        weights["embed"][0, 0] += 1  # a tensor that the fine-tune left alone
    elif change == "missing":
        del weights["embed"]
    else:
        weights["more"] = torch.zeros(1)
    other = save(tmp_path / "other", weights, tokenizer='{"v": 1}', generation_config="{}")
    with pytest.raises(CheckpointError, match=r"another base model, base.*embed|another base model, base.*more"):
        apply_delta(other, delta, tmp_path / "back")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "delta", "other", "target"]


def test_a_changed_file_of_the_base_is_refused(tmp_path: Path, base: Path, delta: Path) -> None:
    (base / "generation_config.json").write_text('{"eos_token_id": 5}')
    with pytest.raises(CheckpointError, match=r"generation_config\.json"):
        apply_delta(base, delta, tmp_path / "back")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "delta", "target"]


def test_an_existing_output(tmp_path: Path, base: Path, target: Path, delta: Path) -> None:
    apply_delta(base, delta, tmp_path / "back")
    make(base, target, tmp_path / "lossy", SIGN)
    before = base_digest(read_checkpoint(tmp_path / "back"))
    with pytest.raises(CheckpointError, match="exists already"):
        apply_delta(base, tmp_path / "lossy", tmp_path / "back")
    assert base_digest(read_checkpoint(tmp_path / "back")) == before
    apply_delta(base, tmp_path / "lossy", tmp_path / "back", force=True)
    assert base_digest(read_checkpoint(tmp_path / "back")) != before
    for out in (base, delta, delta / "files"):
        with pytest.raises(InvalidRequestError, match="give another --out"):
            apply_delta(base, delta, out, force=True)


def test_damaged_tensors_are_noticed(tmp_path: Path, base: Path, delta: Path) -> None:
    file = delta / "delta.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged"):
        apply_delta(base, delta, tmp_path / "back")
    file.write_bytes(content[:-40])
    with pytest.raises(CheckpointError):
        apply_delta(base, delta, tmp_path / "back")
    assert not (tmp_path / "back").exists()

"""Deltas give the fine-tune back bit for bit, on disk and while a model is loaded, and run on no other base."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapters.weights import iterate_weights
from delta.__main__ import main
from delta.apply import DeltaStack
from delta.artifact import open_delta, read_delta_config
from delta.codec import add, encode, same_bits
from delta.make import make_delta
from delta.merge import merge_delta
from delta.tensor_digest import tensor_digest
from registry.checkpoint import read_checkpoint
from registry.digest import base_digest
from registry.errors import CheckpointError, InvalidRequestError, UnsupportedModelError
from tests.fakes.load_plans import make_plan


def _quiet(line: str) -> None:
    pass


def _save(path: Path, weights: dict[str, torch.Tensor], **files: str) -> Path:
    path.mkdir()
    save_file(weights, path / "model.safetensors")
    for name, content in ({"config": "{}"} | files).items():
        (path / f"{name}.json").write_text(content)
    return path


def _base_weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "embed": torch.randn(20, 8, generator=generator).bfloat16(),
        "up": torch.randn(16, 8, generator=generator).bfloat16(),
        "down": torch.randn(8, 16, generator=generator).bfloat16(),
        "norm": torch.ones(8),
        "table": torch.arange(6),
    }


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return _save(tmp_path / "base", _base_weights(), tokenizer='{"v": 1}', generation_config="{}")


@pytest.fixture
def target(tmp_path: Path) -> Path:
    weights = _base_weights()
    weights["up"][3] *= 1.5  # dense, in bfloat16
    weights["down"] = (weights["down"].float() + torch.randn(8, 16) * 1e-3).bfloat16()
    weights["norm"][:2] = torch.tensor([float("nan"), -0.0])  # no sum gives these bits: replaced
    weights["table"][1] = 7
    return _save(tmp_path / "target", weights, tokenizer='{"v": 2}', generation_config="{}")


@pytest.fixture
def delta(tmp_path: Path, base: Path, target: Path) -> Path:
    make_delta(base, target, tmp_path / "delta", report=_quiet)
    return tmp_path / "delta"


def test_making_and_applying_gives_the_fine_tune_back(tmp_path: Path, base: Path, target: Path, delta: Path) -> None:
    config = read_delta_config(delta)
    assert set(config.tensors) == {"up", "down", "norm", "table"}
    assert {name: entry.codec for name, entry in config.tensors.items() if name != "down"} == {
        "up": "dense",
        "norm": "replace",
        "table": "replace",
    }
    assert load_file(delta / "delta.safetensors")["up"].dtype == torch.bfloat16
    assert [file.name for file in (delta / "files").iterdir()] == ["tokenizer.json"]

    merge_delta(base, delta, tmp_path / "merged", report=_quiet, max_shard_bytes=300)
    assert base_digest(read_checkpoint(tmp_path / "merged")) == base_digest(read_checkpoint(target))
    names = {file.name for file in (tmp_path / "merged").iterdir() if "safetensors" not in file.name}
    assert names == {"config.json", "tokenizer.json", "generation_config.json"}
    assert (tmp_path / "merged" / "tokenizer.json").read_text() == '{"v": 2}'


def test_digests_are_those_of_the_registry(base: Path, target: Path, delta: Path) -> None:
    config = read_delta_config(delta)
    assert config.base_digest == base_digest(read_checkpoint(base))
    assert config.target_digest == base_digest(read_checkpoint(target))


def test_applied_while_a_model_is_loaded(base: Path, target: Path, delta: Path) -> None:
    plan = dataclasses.replace(make_plan(), path=base, checkpoint=read_checkpoint(base))
    plain = dict(iterate_weights(plan))
    assert all(same_bits(plain[name], weight) for name, weight in _base_weights().items())
    tuned = dict(iterate_weights(dataclasses.replace(plan, deltas=(delta,))))
    expected = load_file(target / "model.safetensors")
    assert set(tuned) == set(expected)
    assert all(same_bits(tuned[name], weight) for name, weight in expected.items())


def test_two_deltas_add_up(tmp_path: Path, base: Path) -> None:
    deltas = []
    for number, row in enumerate((1, 2)):
        weights = _base_weights()
        weights["up"][row] += 0.5
        _save(tmp_path / f"target{number}", weights)
        make_delta(base, tmp_path / f"target{number}", tmp_path / f"delta{number}", report=_quiet)
        deltas.append(tmp_path / f"delta{number}")
    plan = dataclasses.replace(make_plan(), checkpoint=read_checkpoint(base), deltas=tuple(deltas))
    both = dict(iterate_weights(plan))["up"]
    expected = _base_weights()["up"]
    expected[1:3] += 0.5
    assert torch.equal(both, expected)


def test_two_deltas_of_which_one_replaces_a_tensor_are_refused(base: Path, delta: Path) -> None:
    with open_delta(delta) as first, open_delta(delta) as second, pytest.raises(CheckpointError, match="replaces"):
        DeltaStack([first, second]).apply("norm", _base_weights()["norm"])


def test_another_base_is_refused(tmp_path: Path, delta: Path) -> None:
    for number, change in enumerate(("changed", "missing", "extra")):
        weights = _base_weights()
        if change == "changed":
            weights["embed"][0, 0] += 1  # a tensor that the fine-tune left alone
        elif change == "missing":
            del weights["embed"]
        else:
            weights["more"] = torch.zeros(1)
        other = _save(tmp_path / f"other{number}", weights)
        with pytest.raises(CheckpointError, match="another base model"):
            merge_delta(other, delta, tmp_path / "merged", report=_quiet)
        plan = dataclasses.replace(make_plan(), checkpoint=read_checkpoint(other), deltas=(delta,))
        with pytest.raises(CheckpointError, match="another base model"):
            list(iterate_weights(plan))
    assert not (tmp_path / "merged").exists()


def test_a_changed_file_of_the_base_is_refused(tmp_path: Path, base: Path, delta: Path) -> None:
    (base / "generation_config.json").write_text('{"eos_token_id": 5}')
    with pytest.raises(CheckpointError, match=r"generation_config\.json"):
        merge_delta(base, delta, tmp_path / "merged", report=_quiet)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["base", "delta", "target"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "not the description of a delta"),
        ({"format_version": 2}, "version 2"),
        ({"codec_of_the_future": 1}, "unknown fields"),
        ({"tensors": {"up": {"codec": "zip", "dtype": "BF16", "digest": "0" * 64}}}, "zip"),
        ({"tensors": {"nowhere": {"codec": "dense", "dtype": "BF16", "digest": "0" * 64}}}, "not in the base"),
        ({"tensors": {}}, "different tensors"),
        ({"files": {"../../evil": "0" * 64}}, "plain file name"),
        ({"base": {}}, "damaged"),
    ],
)
def test_damaged_or_foreign_descriptions_are_refused(delta: Path, change: dict[str, object], message: str) -> None:
    file = delta / "delta_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(CheckpointError, match=message), open_delta(delta):
        pass


def test_damaged_tensors_are_noticed(tmp_path: Path, base: Path, delta: Path) -> None:
    file = delta / "delta.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged"):
        merge_delta(base, delta, tmp_path / "merged", report=_quiet)
    plan = dataclasses.replace(make_plan(), checkpoint=read_checkpoint(base), deltas=(delta,))
    with pytest.raises(CheckpointError, match="damaged"):
        list(iterate_weights(plan))
    file.write_bytes(content[:-40])
    with pytest.raises(CheckpointError, match="cannot be read"), open_delta(delta):
        pass


def test_what_is_no_pair_of_base_and_fine_tune(tmp_path: Path, base: Path) -> None:
    with pytest.raises(InvalidRequestError, match="does not differ"):
        make_delta(base, base, tmp_path / "delta", report=_quiet)
    weights = _base_weights()
    weights["embed"] = torch.zeros(21, 8).bfloat16()
    with pytest.raises(CheckpointError, match=r"\[20, 8\].*\[21, 8\]"):
        make_delta(base, _save(tmp_path / "resized", weights), tmp_path / "delta", report=_quiet)
    del weights["embed"]
    with pytest.raises(CheckpointError, match="only the base has 1 tensors"):
        make_delta(base, _save(tmp_path / "fewer", weights), tmp_path / "delta", report=_quiet)
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    torch.save(_base_weights(), pickled / "pytorch_model.bin")
    with pytest.raises(UnsupportedModelError, match="adapters convert"):
        make_delta(base, pickled, tmp_path / "delta", report=_quiet)
    assert not (tmp_path / "delta").exists()


def test_a_fine_tune_that_changes_only_files(tmp_path: Path, base: Path) -> None:
    target = _save(tmp_path / "target", _base_weights(), tokenizer='{"v": 3}')
    make_delta(base, target, tmp_path / "delta", report=_quiet)
    merge_delta(base, tmp_path / "delta", tmp_path / "merged", report=_quiet)
    assert (tmp_path / "merged" / "tokenizer.json").read_text() == '{"v": 3}'
    assert base_digest(read_checkpoint(tmp_path / "merged")) == base_digest(read_checkpoint(base))


@pytest.mark.parametrize("base_dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("target_dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_encoding_is_exact(base_dtype: torch.dtype, target_dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    before = torch.randn(50, 40, generator=generator).to(base_dtype)
    for size in (0.0, 1e-6, 1e-3, 1.0, 1e4):
        after = (before.float() + torch.randn(50, 40, generator=generator) * size).to(target_dtype)
        codec, stored = encode(before, after)
        back = stored if codec == "replace" else add(before, stored, target_dtype)
        assert same_bits(back, after)


def test_digest_tells_dtype_shape_and_content() -> None:
    tensors = [torch.zeros(4), torch.zeros(2, 2), torch.zeros(4, dtype=torch.int32), torch.tensor([0.0, -0.0, 0, 0])]
    assert len({tensor_digest(tensor) for tensor in tensors}) == 4
    assert tensor_digest(torch.arange(6).reshape(2, 3).t()) == tensor_digest(torch.tensor([[0, 3], [1, 4], [2, 5]]))


def test_command_line(tmp_path: Path, base: Path, target: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make = ["make", "--base", str(base), "--target", str(target), "--out", str(tmp_path / "d")]
    assert main(make) == 0
    assert "4 of 5 tensors changed" in capsys.readouterr().out
    assert main(make) == 1
    error = capsys.readouterr().err
    assert "exists already" in error
    assert error.count("\n") == 1
    assert main(["apply", "--base", str(base), "--delta", str(tmp_path / "d"), "--out", str(tmp_path / "m")]) == 0
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "d"), "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["changed_tensors"] == 4
    assert summary["base"].startswith("sha256:")
    assert main(["inspect", str(tmp_path / "d")]) == 0
    assert "changed tensors" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "d")
    assert main(["inspect", str(tmp_path / "d")]) == 1

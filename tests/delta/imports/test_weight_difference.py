from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from delta.__main__ import main
from tests.delta.models import base_weights, save


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save(tmp_path / "base", base_weights(torch.float16))


@pytest.fixture
def target(tmp_path: Path) -> Path:
    weights = base_weights(torch.float16)
    torch.manual_seed(0)
    weights["up"] += 0.01 * torch.randn(16, 8).half()
    weights["norm"] += 0.5
    return save(tmp_path / "target", weights, tokenizer='{"v": 2}')


def test_made_imported_and_applied_as_fastchat_does(tmp_path: Path, base: Path, target: Path) -> None:
    models = ["--base", str(base), "--target", str(target)]
    assert main(["make", *models, "--out", str(tmp_path / "d"), "--codec", "dense", "--layout", "huggingface"]) == 0
    ours, theirs, plain = (load_file(path / "model.safetensors") for path in (base, target, tmp_path / "d"))
    assert torch.equal(plain["up"], theirs["up"] - ours["up"])
    assert (tmp_path / "d" / "tokenizer.json").read_text() == '{"v": 2}'
    assert main(["import", "fastchat", str(tmp_path / "d"), "--base", str(base), "--out", str(tmp_path / "delta")]) == 0
    delta = ["--base", str(base), "--delta", str(tmp_path / "delta"), "--out", str(tmp_path / "model")]
    assert main(["apply", *delta]) == 0
    applied = load_file(tmp_path / "model" / "model.safetensors")
    for name in ours:
        assert torch.equal(applied[name], ours[name] + plain[name])  # FastChat's sum
    assert (tmp_path / "model" / "tokenizer.json").read_text() == '{"v": 2}'


def test_only_plain_differences_have_that_layout(
    tmp_path: Path, base: Path, target: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--base", str(base), "--target", str(target), "--out", str(tmp_path / "d"), "--layout", "huggingface"]
    assert main(["make", *flags]) == 1
    assert "--codec dense" in capsys.readouterr().err


@pytest.mark.parametrize("change", ["missing", "shape", "more", "nan"])
def test_differences_to_another_base(
    tmp_path: Path, base: Path, change: str, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = {name: torch.zeros_like(weight) for name, weight in base_weights(torch.float16).items()}
    plain["up"][0, 0] = 1
    if change == "missing":
        del plain["down"]
    elif change == "shape":
        plain["down"] = torch.ones(8, 15).half()
    elif change == "more":
        plain["odd"] = torch.ones(2, 2)
    else:
        plain["down"][0, 0] = torch.nan
    source = save(tmp_path / "plain", plain)
    assert main(["import", "fastchat", str(source), "--base", str(base), "--out", str(tmp_path / "delta")]) == 1
    error = capsys.readouterr().err
    assert {"missing": "lacks", "shape": "is it its base", "more": "does not have", "nan": "not finite"}[
        change
    ] in error
    assert not (tmp_path / "delta").exists()


def test_buffers_without_a_change_are_passed_over(tmp_path: Path, base: Path) -> None:
    plain = {name: torch.zeros_like(weight) for name, weight in base_weights(torch.float16).items()}
    plain["up"][0, 0] = 1
    source = save(tmp_path / "plain", plain | {"rotary_emb.inv_freq": torch.zeros(4)})
    assert main(["import", "fastchat", str(source), "--base", str(base), "--out", str(tmp_path / "delta")]) == 0

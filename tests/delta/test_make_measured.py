from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from delta.__main__ import main
from delta.codecs.policy import CodecPolicy
from delta.delta_config import DeltaConfig, read_delta_config
from delta.make import Labels, make_delta
from delta.make_measured import make_measured_delta
from delta.quality import QualityMeter
from delta.quality_gate import QualityGate, QualityTooLowError
from delta.quality_prompts import QualityPrompts
from delta.quality_record import Quality
from registry.errors import CheckpointError, UnsupportedModelError
from tests.delta.tiny_llama import save_tiny_llama

PROMPTS = QualityPrompts("default", ("Some text.", "Another one, a little longer."))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_tiny_llama(tmp_path / "base", 0)


@pytest.fixture
def target(tmp_path: Path, base: Path) -> Path:
    """Every matrix changed by a tenth of its size."""
    directory = save_tiny_llama(tmp_path / "target", 0)
    weights = load_file(directory / "model.safetensors")
    torch.manual_seed(1)
    for name, weight in weights.items():
        if weight.ndim == 2:
            weights[name] = weight + 0.1 * weight.square().mean().sqrt() * torch.randn_like(weight)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def _make(base: Path, target: Path, policy: CodecPolicy, gate: QualityGate | None, lines: list[str]) -> DeltaConfig:
    out = base.parent / "delta"
    return make_measured_delta(
        base, target, out, policy, prompts=PROMPTS, gate=gate, labels=Labels(), report=lines.append
    )


def test_quality_and_probe_are_recorded(base: Path, target: Path) -> None:
    config = _make(base, target, CodecPolicy("sign"), None, [])
    assert read_delta_config(base.parent / "delta") == config
    assert config.quality is not None
    assert config.quality.base_kl_mean is not None
    assert 0 < config.quality.kl_mean < config.quality.base_kl_mean
    assert config.probe is not None
    assert len(config.probe.cases) == 1  # every second prompt is for the making
    assert config.quality.num_prompts == 1


def test_auto_stores_as_much_as_the_gate_asks_for(base: Path, target: Path) -> None:
    loose: list[str] = []
    first = _make(base, target, CodecPolicy(), QualityGate(max_kl=10, min_answers=0), loose)
    assert {tensor.codec for tensor in first.tensors.values()} == {"sign"}
    assert not any("again" in line for line in loose)
    (base.parent / "delta").rename(base.parent / "first")
    assert first.quality is not None
    strict: list[str] = []
    gate = QualityGate(max_kl=first.quality.kl_mean / 3, max_kl_share=0, min_answers=0)
    second = _make(base, target, CodecPolicy(), gate, strict)
    assert second.quality is not None
    assert second.quality.kl_mean <= gate.max_kl
    assert any("making it again" in line for line in strict)
    assert any("+" in tensor.codec for tensor in second.tensors.values())


def test_nothing_but_all_bits_is_good_enough(base: Path, target: Path) -> None:
    config = _make(base, target, CodecPolicy(), QualityGate(max_kl=1e-9, max_kl_share=0), [])
    assert config.quality is not None
    assert config.quality.kl_mean <= 1e-9
    assert config.is_exact


def test_a_named_codec_that_is_too_coarse_fails_and_leaves_nothing(base: Path, target: Path) -> None:
    with pytest.raises(QualityTooLowError, match=r"asked for are at most 1e-09 nats and at least 99\.5%: take a finer"):
        _make(base, target, CodecPolicy("sign"), QualityGate(max_kl=1e-9, max_kl_share=0), [])
    assert sorted(path.name for path in base.parent.iterdir()) == ["base", "target"]


def test_an_output_that_cannot_be_is_refused_before_anything_is_computed(base: Path, target: Path) -> None:
    (base.parent / "delta").mkdir()
    lines: list[str] = []
    with pytest.raises(CheckpointError, match="exists already"):
        _make(base, target, CodecPolicy(), QualityGate(), lines)
    assert lines == []


def test_the_gate() -> None:
    quality = Quality(
        "default", 1, 1, kl_mean=0.02, kl_max=1, base_kl_mean=0.3, top1=1, num_answer_tokens=100, answers=0.99
    )
    for gate in (QualityGate(max_kl=0.02, max_kl_share=0), QualityGate(max_kl=0.01, max_kl_share=0.1)):
        assert replace(gate, min_answers=0.99).admits(quality)
        assert not replace(gate, min_answers=0.995).admits(quality)
    gate = QualityGate(max_kl=0.01, max_kl_share=0.1, min_answers=0)
    assert not replace(gate, max_kl_share=0).admits(quality)
    assert not gate.admits(replace(quality, base_kl_mean=None))


def test_low_rank_terms_are_made_for_the_inputs_of_the_fine_tune(base: Path, target: Path) -> None:
    policy = CodecPolicy("sign", ("lowrank",), 2)
    measured = _make(base, target, policy, None, [])
    plain = make_delta(base, target, base.parent / "plain", policy, labels=Labels(), report=[].append)
    changed = [name for name in plain.tensors if plain.tensors[name] != measured.tensors[name]]
    assert changed
    assert all(name.endswith(("proj.weight", "lm_head.weight")) for name in changed)


def test_command_line(base: Path, target: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = base.parent / "prompts.json"
    prompts.write_text('["Some text."]')
    flags = ["make", "--base", str(base), "--target", str(target), "--codec", "sign"]
    assert main([*flags, "--out", str(base.parent / "d"), "--prompts", str(prompts)]) == 0
    assert "top-1" in capsys.readouterr().out
    assert main([*flags, "--out", str(base.parent / "e"), "--no-quality"]) == 0
    assert "top-1" not in capsys.readouterr().out
    for bound in (("--max-kl", "1e-9"), ("--min-answers", "1")):
        assert main([*flags, "--out", str(base.parent / "f"), "--prompts", str(prompts), *bound]) == 1
        assert "finer codec" in capsys.readouterr().err
    assert main([*flags[:-1], "lossless", "--out", str(base.parent / "g"), "--prompts", str(prompts)]) == 0
    assert "top-1" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags",
    [
        ["--no-quality", "--max-kl", "1"],
        ["--codec", "dense", "--layout", "huggingface", "--min-answers", "1"],
        ["--codec", "dense", "--layout", "huggingface", "--name", "n"],
        ["--codec", "dense", "--layout", "huggingface", "--quality"],
        ["--codec", "lossless", "--residual", "sign"],
        ["--rank", "0"],
        ["--codec", "sparse", "--rank", "4"],
        ["--max-kl", "-1"],
        ["--min-answers", "99.5"],
    ],
)
def test_flags_that_cannot_be_followed_are_refused(
    flags: list[str], base: Path, target: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = base.parent / "delta"
    assert main(["make", "--base", str(base), "--target", str(target), "--out", str(out), *flags]) == 1
    assert "--" in capsys.readouterr().err
    assert not out.exists()


def test_a_damaged_model_is_one_clear_error(base: Path, target: Path) -> None:
    config = target / "config.json"
    whole = config.read_text()
    config.write_text(whole.replace('"hidden_size": ', '"hidden_size": "big", "other": '))
    with pytest.raises(UnsupportedModelError, match="hidden_size"):
        _make(base, target, CodecPolicy("sign"), None, [])
    config.write_text(whole)
    weights = target / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    lines: list[str] = []
    with pytest.raises(CheckpointError, match="truncated"):
        _make(base, target, CodecPolicy("sign"), None, lines)
    assert lines == []  # before anything is computed


def test_auto_goes_on_with_the_residuals_at_which_it_was_killed(
    base: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = QualityGate(max_kl=1e-9, max_kl_share=0)
    killed: list[str] = []

    def measure(meter: QualityMeter, weights: Mapping[str, Tensor], **options: object) -> object:
        if any("sign + sign" in line for line in killed):
            raise KeyboardInterrupt
        return as_it_is(meter, weights, **options)  # type: ignore[arg-type]

    as_it_is = QualityMeter.measure
    monkeypatch.setattr(QualityMeter, "measure", measure)
    with pytest.raises(KeyboardInterrupt):
        _make(base, target, CodecPolicy(), gate, killed)
    monkeypatch.undo()
    again: list[str] = []
    assert _make(base, target, CodecPolicy(), gate, again).is_exact
    assert any("going on after" in line for line in again)
    assert len([line for line in again if "making it again" in line]) < 4  # of 4 from the beginning

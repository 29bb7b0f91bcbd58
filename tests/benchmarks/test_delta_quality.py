from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from delta.quality_record import Quality
from tests.delta.tiny_llama import save_tiny_llama


@pytest.fixture
def script(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("delta_quality")


class DistanceMeter:
    """In place of divergences: how far weights are from the fine-tune's, as a share of how far the base's are."""

    def __init__(self, base: Path, target: Path, prompts: object, *, calibration: object) -> None:
        self._base = load_file(base / "model.safetensors")
        self._target = load_file(target / "model.safetensors")
        generator = torch.Generator().manual_seed(0)
        self.inputs = {
            name: (torch.randn(32, weight.shape[1], generator=generator).bfloat16(),)
            for name, weight in self._target.items()
            if name.endswith("proj.weight")
        }

    def measure(self, weights: Mapping[str, Tensor]) -> tuple[Quality, None]:
        distance = self._distance(weights) / self._distance(self._base)
        return Quality("default", 1, 1, distance, distance, 1.0, 1.0, 1, 1.0), None

    def _distance(self, weights: Mapping[str, Tensor]) -> float:
        return sum(float((weights[name].float() - self._target[name].float()).square().sum()) for name in self.inputs)


def test_each_fine_tune_is_measured_with_every_kind_of_delta(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(script, "QualityMeter", DistanceMeter)
    base, result = save_tiny_llama(tmp_path / "base", 0), tmp_path / "result.json"
    targets = []
    for seed in (1, 2):
        targets.append(save_tiny_llama(tmp_path / f"target{seed}", 0))
        weights = load_file(targets[-1] / "model.safetensors")
        torch.manual_seed(seed)
        changed = {
            name: weight + 0.1 * weight.std() * torch.randn_like(weight) if weight.ndim == 2 else weight
            for name, weight in weights.items()
        }
        save_file(changed, targets[-1] / "model.safetensors", metadata={"format": "pt"})
    flags = ["--base", str(base), "--targets", ",".join(map(str, targets)), "--json", str(result)]
    assert script.main(flags) == 0
    report = json.loads(result.read_text())
    assert report["command"] == "python benchmarks/delta_quality.py --base base --targets target1,target2"
    assert sorted(report["found"]) == ["target1", "target2"]
    for found in report["found"].values():
        assert 0.0 < found["sign-r16"]["kl_mean"] < found["bitdelta"]["kl_mean"] < 1.0
        assert found["kl_of_sign_r16_over_bitdelta"] == pytest.approx(
            found["sign-r16"]["kl_mean"] / found["bitdelta"]["kl_mean"]
        )
        assert 0 < found["bitdelta"]["bytes_of_linears"] < found["sign-r16"]["bytes_of_linears"]
    table = capsys.readouterr().out
    assert table.count("| target1 | ") == table.count("| target2 | ") == len(script.KINDS)
    assert "| target2 | sign-r16-any-inputs | " in table

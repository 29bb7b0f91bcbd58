"""The benchmarks for GPUs, rehearsed on a CPU: they ask the engine for what they say, and write it down."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest

from tests.benchmarks.gpu_rehearsal import rehearse


@pytest.fixture
def modules(load_script: object, monkeypatch: pytest.MonkeyPatch) -> dict[str, ModuleType]:
    """The scripts, for a model of two small layers, contexts of 64 tokens and a device that only seems to be there."""
    return rehearse(monkeypatch)


def test_steps_prompts_and_throughput(
    modules: dict[str, ModuleType], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "figures.json"
    assert modules["gpu_engine"].main(["--checkpoint", str(tmp_path / "model"), "--json", str(path)]) == 0
    found = {figure.name: figure for figure in modules["gpu_figures"].read_figures(path)}
    assert list(found) == [
        "start, to ready, files in the page cache",
        "decode, batch 1, context 64",
        "decode, batch 5, context 64",
        "launch gaps, batch 3",
        "prefill, 200 tokens",
        "throughput, 12 requests, 20 in, 5 out",
    ]
    assert all(figure.value > 0 for figure in found.values())
    assert "decode, batch 5" in capsys.readouterr().out


def test_attention(modules: dict[str, ModuleType], tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    assert modules["gpu_attention"].main(["--json", str(path)]) == 0
    found = modules["gpu_figures"].read_figures(path)
    assert [figure.target for figure in found] == [0.85, None, None, None, None]
    assert all(figure.value > 0 for figure in found)


def test_variants(modules: dict[str, ModuleType], tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    assert modules["gpu_variants"].main(["--checkpoint", str(tmp_path / "model"), "--json", str(path)]) == 0
    found = modules["gpu_figures"].read_figures(path)
    assert [figure.name for figure in found] == [
        "LoRA r16, 2 distinct",
        "LoRA, mixed ranks 8-64",
        "1-bit deltas, 1 distinct",
        "1-bit deltas, 3 distinct",
        "1-bit deltas, 6 rows, Zipf 1.5",
        "1-bit deltas, 3, against separate models",
        "1-bit delta, prompt of 100 tokens",
        "LoRA r16, 5 distinct",
    ]
    assert all(figure.value is not None and figure.target is not None for figure in found)


def test_quantized_weights(modules: dict[str, ModuleType], tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    assert modules["gpu_quantized"].main(["--checkpoint", str(tmp_path / "model"), "--json", str(path)]) == 0
    found = modules["gpu_figures"].read_figures(path)
    assert [figure.name for figure in found] == ["fp8 weights, batch 1", "int4 weights, batch 1"]


def test_models_of_one_layer_are_started(
    modules: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    module = modules["gpu_compile"]
    started = []

    class InThisProcess:
        def __init__(self, command: list[str]) -> None:
            started.append(command[-1])
            self._status = module.main(command[len(module.COMMAND) :])

        def wait(self) -> int:
            return int(self._status)

    monkeypatch.setattr(module.subprocess, "Popen", InThisProcess)
    path = tmp_path / "figures.json"
    assert module.main(["--checkpoint", str(tmp_path / "model"), "--json", str(path)]) == 0
    assert started == ["none", "fp8", "int4"]
    assert (tmp_path / "model" / "config.json").is_file()
    assert '"num_hidden_layers": 1' in (tmp_path / "model-of-one-layer" / "config.json").read_text()
    (figure,) = modules["gpu_figures"].read_figures(path)
    assert figure.name == "kernels compiled, model written"


def test_the_batching_of_transformers_answers_all_requests(modules: dict[str, ModuleType], tmp_path: Path) -> None:
    """Of the transformers that is installed: that it is called as it wants to be."""
    peers = modules["gpu_peers"]
    path = peers.write_checkpoint(tmp_path / "model", peers.LLAMA_8B, "cpu")
    generate = peers._transformers(path)
    assert generate([[1, 2, 3], [4, 5, 6, 7]], 4) == 8

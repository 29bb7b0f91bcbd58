"""The benchmarks for GPUs, on a tiny model and a CPU: they ask the engine for what they say, and write it down."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
NAMES = (
    "gpu_figures", "gpu_ceilings", "gpu_checkpoint", "gpu_steps", "gpu_engine", "gpu_variants", "gpu_quantized",
)  # fmt: skip
SHRUNK: dict[str, Any] = {
    "vocab_size": 600,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, ModuleType]]:
    """The scripts, for a model of two small layers, contexts of 64 tokens and a device that need not be waited for."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    found = {name: importlib.import_module(name) for name in NAMES}
    config = found["gpu_checkpoint"].LLAMA_8B
    for key, value in SHRUNK.items():
        monkeypatch.setitem(config, key, value)
    write = found["gpu_checkpoint"].write_checkpoint
    ceilings = found["gpu_ceilings"].Ceilings(1e9, 1e12)
    for name in ("gpu_engine", "gpu_variants", "gpu_quantized"):
        module = found[name]
        monkeypatch.setattr(module, "write_checkpoint", lambda path, config, device: write(path, config, "cpu"))
        monkeypatch.setattr(module, "CONTEXT", 64)
        monkeypatch.setattr(module, "NUM_STEPS", 6)
    monkeypatch.setattr(found["gpu_engine"], "measure_ceilings", lambda: ceilings)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    yield found
    for name in NAMES:
        sys.modules.pop(name, None)


def test_steps_prompts_and_throughput(
    modules: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine, figures = modules["gpu_engine"], modules["gpu_figures"]
    monkeypatch.setattr(engine, "DECODE_TARGETS", {1: 0.85, 5: 0.8})
    monkeypatch.setattr(engine, "trace_decoding", lambda *_, **__: modules["gpu_steps"].Busy(100.0, 1.0, 5.0))
    for name, value in {"PROMPT_TOKENS": 200, "NUM_REQUESTS": 12, "TOKENS_IN": 20, "TOKENS_OUT": 5}.items():
        monkeypatch.setattr(engine, name, value)
    monkeypatch.setattr(engine, "MAX_MODEL_LEN", 512)
    monkeypatch.setattr(engine, "MAX_NUM_SEQS", 8)
    path = tmp_path / "figures.json"
    assert engine.main(["--checkpoint", str(tmp_path / "model"), "--json", str(path)]) == 0
    found = {figure.name: figure for figure in figures.read_figures(path)}
    assert list(found) == [
        "start, to ready, files in the page cache",
        "decode, batch 1, context 64",
        "decode, batch 5, context 64",
        "launch gaps, batch 32",
        "prefill, 200 tokens",
        "throughput, 12 requests, 20 in, 5 out",
    ]
    assert all(figure.value > 0 for figure in found.values())
    assert found["launch gaps, batch 32"].met
    assert "decode, batch 5" in capsys.readouterr().out


def test_variants(modules: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    variants, figures = modules["gpu_variants"], modules["gpu_figures"]
    smaller = {
        "MEMORY_GIB": 0.5,
        "PROMPT_TOKENS": 100,
        "LORA_TARGETS": {2: 0.9, 5: 0.7},
        "MIXED_ROWS": 4,
        "SIGN_TARGETS": {1: 0.9, 3: 0.6},
        "NUM_SIGNS": 5,
        "ZIPF_ROWS": 6,
        "SEPARATE_TARGETS": {3: 2.0},
    }
    for name, value in smaller.items():
        monkeypatch.setattr(variants, name, value)
    path = tmp_path / "figures.json"
    assert variants.main(["--checkpoint", str(tmp_path / "model"), "--json", str(path)]) == 0
    found = figures.read_figures(path)
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


def test_quantized_weights(modules: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    quantized, figures = modules["gpu_quantized"], modules["gpu_figures"]
    monkeypatch.setattr(quantized, "TARGETS", {"int8": 1.6, "int4": 2.5})  # a CPU has no float8 weights
    path = tmp_path / "figures.json"
    assert quantized.main(["--checkpoint", str(tmp_path / "model"), "--json", str(path)]) == 0
    assert [figure.name for figure in figures.read_figures(path)] == ["int8 weights, batch 1", "int4 weights, batch 1"]

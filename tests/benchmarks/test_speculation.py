from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture
def script(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("speculation")


def test_both_engines_are_measured_and_written_down(
    script: ModuleType, smollm2_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "result.json"
    arguments = ["--model-path", str(smollm2_dir), "--streams", "1", "--output-tokens", "3", "--repeats", "1"]
    monkeypatch.setattr(sys, "argv", ["speculation.py", *arguments, "--json", str(path)])
    script.main()
    report = json.loads(path.read_text())
    assert [result["task"] for result in report["results"]] == list(script.TASKS)
    for result in report["results"]:
        assert result["num_streams"] == 1
        assert result["off_tokens_per_s"] > 0 < result["ngram_tokens_per_s"]
    assert report["command"].startswith("python benchmarks/speculation.py --model-path")

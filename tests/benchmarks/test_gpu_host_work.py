"""What the host does for a step is counted, in an engine that runs ahead of a GPU that does nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest


def test_steps_are_counted_and_written_down(
    load_script: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    script = load_script("gpu_host_work")
    for name, value in {"CASES": ((3, 40),), "NUM_STEPS": 2, "REPEATS": 2}.items():
        monkeypatch.setattr(script, name, value)
    path = tmp_path / "result.json"
    assert script.main(["--json", str(path)]) == 0
    (result,) = json.loads(path.read_text())["results"]
    assert (result["rows"], result["context"]) == (3, 40)
    assert 0 < result["best_us"] <= result["median_us"]

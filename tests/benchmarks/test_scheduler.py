from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture
def script(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("scheduler")


def test_every_load_runs_and_is_written_down(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "result.json"
    size = ["--num-seqs", "4", "--num-tokens", "20", "--block-size", "4", "--num-steps", "9", "--repeats", "1"]
    assert script.main([*size, "--json", str(path)]) == 0
    report = json.loads(path.read_text())
    assert [load["load"] for load in report["loads"]] == ["decode", "boundary", "churn", "drafts"]
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == report["loads"]
    assert report["size"] == {"num_seqs": 4, "num_tokens": 20, "block_size": 4, "num_steps": 9}


def test_a_missing_directory_is_an_error_before_anything_runs(script: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="2"):
        script.main(["--json", str(tmp_path / "missing" / "result.json")])

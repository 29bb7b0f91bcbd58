import json
from collections.abc import Callable
from types import ModuleType

import pytest


@pytest.fixture
def serving_overhead(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("serving_overhead")


@pytest.mark.e2e
def test_a_short_run(serving_overhead, smollm2_dir, tmp_path, capsys) -> None:
    report = tmp_path / "report.json"
    arguments = ["--model-path", str(smollm2_dir), "--levels", "1:1,4:0", "--output-tokens", "20"]
    assert serving_overhead.main([*arguments, "--json", str(report)]) == 0
    levels = json.loads(report.read_text())["levels"]
    assert [(level["level"]["streams"], level["level"]["step_ms"]) for level in levels] == [(1, 1.0), (4, 0.0)]
    assert all(level["tokens_per_s"] > 0 and level["chunks_per_token"] <= 1 for level in levels)
    assert levels[1]["late_ms"] is None
    assert "| 4 | 0 |" in capsys.readouterr().out


def test_processes_that_do_not_start_are_told(serving_overhead, tmp_path, capsys) -> None:
    assert serving_overhead.main(["--model-path", str(tmp_path / "absent"), "--levels", "1:1"]) == 1
    assert "absent is neither a path that exists nor a known model" in capsys.readouterr().err

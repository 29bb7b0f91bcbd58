from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture
def script(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("startup")


@pytest.mark.e2e
def test_a_start_is_measured_and_written_down(
    script: ModuleType, smollm2_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "result.json"
    arguments = ["--model-path", str(smollm2_dir), "--cases", "bf16", "--repeats", "1", "--no-warm-up"]
    assert script.main([*arguments, "--json", str(path)]) == 0
    report = json.loads(path.read_text())
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == report["cases"]
    (case,) = report["cases"]
    (start,) = case["starts"]
    assert case["case"] == "bf16"
    assert 0 < start["health_s"] <= start["first_token_s"] == case["first_token_s"]


def test_a_worker_that_cannot_start_is_an_error_with_its_reason(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script.main(["--model-path", str(tmp_path / "missing"), "--cases", "int8", "--repeats", "1"]) == 1
    error = capsys.readouterr().err
    assert "int8: the worker ended with status 1" in error
    assert "neither a path that exists nor a known model" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cases", "bf16,gguf"], "gguf are none of bf16, int8, int4"),
        (["--json", "/missing/result.json"], "no directory"),
    ],
)
def test_wrong_arguments_are_errors_before_anything_runs(
    script: ModuleType, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit, match="2"):
        script.main(["--model-path", "x", *arguments])
    assert message in capsys.readouterr().err


def test_gguf_is_measured_where_a_file_is_given(script: ModuleType) -> None:
    assert [case.name for case in script.cases("m", None)] == ["bf16", "int8", "int4"]
    assert script.cases("m", "f.gguf")[-1] == script.Case("gguf", "f.gguf", ())

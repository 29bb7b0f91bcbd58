from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import pytest

from model_worker.engine.ops.cpu.build import find_compiler

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def script(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("cost_growth")


@pytest.mark.skipif(find_compiler() is None, reason="there is no C++ compiler")
def test_steps_are_measured_and_those_that_do_not_fit_are_listed(
    script: ModuleType, smollm2_dir: Path, tmp_path: Path
) -> None:
    path = tmp_path / "result.json"
    flags = ["--rows", "1,2", "--context", "16,32", "--precision", "bfloat16", "--num-threads", "1", "--rounds", "2"]
    two_blocks = str(2.5 * 16 * 30 * 2 * 3 * 64 * 2 / 2**30)
    assert (
        script.main(["--model-path", str(smollm2_dir), *flags, "--kv-cache-gib", two_blocks, "--json", str(path)]) == 0
    )
    report = json.loads(path.read_text())
    assert [(point["num_rows"], point["context"]) for point in report["points"]] == [(1, 16), (2, 16), (1, 32)]
    assert all(point["precision"] == "bfloat16" and point["step_ms"] > 0 for point in report["points"])
    assert report["left_out"] == [{"num_rows": 2, "context": 32, "kv_bytes": 64 * 30 * 2 * 3 * 64 * 2}]


def test_a_measurement_of_before_is_drawn(script: ModuleType, tmp_path: Path) -> None:
    points = [
        {"precision": precision, "num_rows": rows, "context": context, "step_ms": 0.1 * rows * context}
        for precision in ("bfloat16", "int8") for rows in (1, 4) for context in (128, 512, 8192)
    ]  # fmt: skip
    (tmp_path / "result.json").write_text(json.dumps({"points": points}))
    plot = tmp_path / "cost.svg"
    assert script.main(["--read", str(tmp_path / "result.json"), "--svg", str(plot)]) == 0
    text = plot.read_text()
    root = ElementTree.fromstring(text)
    assert root.tag == f"{SVG}svg"
    assert len(root.findall(f".//{SVG}polyline")) == 2 * (3 + 2)
    assert "bfloat16: a decode step by streams, for each length of the context" in text
    assert "http" not in text.replace('xmlns="http://www.w3.org/2000/svg"', "")
    for name in {part.split(")")[0] for part in text.split("var(")[1:]}:
        assert f"{name}:" in text, name


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--model-path", "m", "--read", "r"],
        ["--model-path", "m", "--precision", "int3"],
        ["--model-path", "m", "--rows", "0"],
        ["--model-path", "m", "--svg", "/nonexistent/plot.svg"],
    ],
)
def test_bad_flags_are_a_usage_error(script: ModuleType, flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        script.main(flags)
    assert "error" in capsys.readouterr().err

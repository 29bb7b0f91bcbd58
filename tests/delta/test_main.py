"""The command line: one line for an error, tables for people, JSON for programs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from delta.__main__ import main


def test_verbs(tmp_path: Path, base: Path, target: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make = ["make", "--base", str(base), "--target", str(target), "--out", str(tmp_path / "d"), "--codec", "lossless"]
    assert main(make) == 0
    assert "4 of 5 tensors changed" in capsys.readouterr().out
    assert main(make) == 1
    error = capsys.readouterr().err
    assert "exists already" in error
    assert error.count("\n") == 1
    assert main([*make, "--force"]) == 0
    assert main(["verify", str(tmp_path / "d"), "--base", str(base)]) == 0
    assert "is whole and belongs to" in capsys.readouterr().out
    apply = ["apply", "--base", str(base), "--delta", str(tmp_path / "d"), "--out", str(tmp_path / "m")]
    assert main([*apply, "--dtype", "float32"]) == 0
    capsys.readouterr()

    assert main(["inspect", str(tmp_path / "d"), "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["exact"] is True
    assert summary["tensors"]["up"]["codec"] == "lossless"
    assert summary["base"]["digest"].startswith("sha256:")
    assert main(["inspect", str(tmp_path / "d")]) == 0
    assert "bits/weight" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "d")
    assert main(["inspect", str(tmp_path / "d")]) == 1

"""`python -m delta import` itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from delta.__main__ import main


def test_every_path_that_leads_nowhere_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, base, out = str(tmp_path / "diff.pt"), str(tmp_path / "base"), str(tmp_path / "delta")
    assert main(["import", "bitdelta", source, "--base", base, "--out", out]) == 1
    assert f"the source {source}, the base (--base) {base}" in capsys.readouterr().err

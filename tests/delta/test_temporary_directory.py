from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from delta.temporary_directory import temporary_directory

LONG_AGO = (0, 0)  # access and change, Unix time


def test_what_killed_processes_left_is_removed_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for name in ("made-left", "made-young", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    (tmp_path / "made-link").symlink_to(tmp_path / "other")
    for name in ("made-left", "other"):
        os.utime(tmp_path / name, LONG_AGO)
    with temporary_directory("made-") as first:
        os.utime(first, LONG_AGO)
        with temporary_directory("made-") as second:
            kept = {"made-young", "made-link", "other", first.name, second.name}
            assert {path.name for path in tmp_path.iterdir()} == kept
    assert {path.name for path in tmp_path.iterdir()} == {"made-young", "made-link", "other"}
    assert (tmp_path / "other" / "file").exists()

"""What the set-up does about the CPU kernels where something is lacking, and where nothing is."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from types import ModuleType

import pytest

_FILE = Path(__file__).parent.parent.parent / "scripts" / "environment.py"


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """scripts/environment.py with a Python of our own, a shell script, in a virtual environment of our own.

    The commands that may be found on the path are those of tmp_path/bin.
    """
    spec = importlib.util.spec_from_file_location("environment", _FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (tmp_path / "bin").mkdir()
    monkeypatch.setattr(module, "VENV", tmp_path)
    monkeypatch.setattr(module, "PYTHON", tmp_path / "python")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return module


def _script(path: Path, body: str) -> None:
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


def test_kernels_are_built_once(environment: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _script(tmp_path / "bin" / "c++", "")
    _script(tmp_path / "python", f'echo "$@" >> {tmp_path}/calls.txt; : > {tmp_path}/k.so; echo {tmp_path}/k.so')
    environment.prepare_kernels()
    assert "Building the CPU kernels" in capsys.readouterr().out
    environment.prepare_kernels()
    assert capsys.readouterr().out == ""
    assert (tmp_path / "calls.txt").read_text() == "-m model_worker.engine.ops.cpu\n"
    (tmp_path / "k.so").unlink()
    environment.prepare_kernels()
    assert (tmp_path / "k.so").is_file()


def test_a_build_that_fails_is_said_and_no_failure(
    environment: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _script(tmp_path / "bin" / "c++", "")
    _script(tmp_path / "python", "echo 'error: x.cpp:7 is bad' >&2; echo details >&2; exit 1")
    environment.prepare_kernels()
    assert capsys.readouterr().out.splitlines()[-1] == (
        "There are no CPU kernels, so the engine serves by a slower route. x.cpp:7 is bad"
    )


def test_no_compiler_is_said_and_no_failure(environment: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    environment.prepare_kernels()
    line = capsys.readouterr().out
    assert "slower route. g++ is needed for the CPU kernels: install it" in line
    with pytest.raises(SystemExit):
        environment.prepare_compiler()


def test_a_compiler_is_installed_by_root(
    environment: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    _script(tmp_path / "bin" / "apt-get", f'echo "$@" >> {tmp_path}/calls.txt')
    _script(tmp_path / "python", f": > {tmp_path}/k.so; echo {tmp_path}/k.so")
    environment.prepare_kernels()
    assert (tmp_path / "calls.txt").read_text() == "update\ninstall -y g++\n"
    assert "Building" in capsys.readouterr().out


def test_a_package_index_out_of_reach_is_said_and_no_failure(
    environment: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    _script(tmp_path / "bin" / "apt-get", "echo 'E: no network' >&2; exit 100")
    environment.prepare_kernels()
    assert capsys.readouterr().out.splitlines()[-1].endswith("slower route. `apt-get update` failed: E: no network")

"""When kernels are built: never by only looking for them, always where nothing else will do and there is a compiler."""

from __future__ import annotations

from pathlib import Path

import pytest

from model_worker.engine.ops.cpu import kernels
from model_worker.engine.ops.cpu.machine_level import MachineLevel


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The libraries that were built."""
    libraries: list[Path] = []

    def build(level: MachineLevel, cache_dir: Path) -> Path:
        libraries.append(cache_dir / level.name)
        return libraries[-1]

    monkeypatch.setattr(kernels, "build_library", build)
    monkeypatch.setattr(kernels, "KernelLibrary", lambda path, level: path)
    monkeypatch.setattr(kernels, "find_compiler", lambda: "c++")
    return libraries


def test_looking_for_kernels_builds_none(built: list[Path], tmp_path: Path) -> None:
    assert kernels.find_kernels(tmp_path) is None
    assert built == []


def test_required_kernels_are_built(built: list[Path], tmp_path: Path) -> None:
    found = kernels.find_kernels(tmp_path, required=True)
    assert [found] == built
    assert found is not None


def test_without_a_compiler_there_are_none(built: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "find_compiler", lambda: None)
    assert kernels.find_kernels(tmp_path, required=True) is None
    assert built == []

"""The CPU kernels, built once for every level that this machine runs, and teams of threads to run them."""

from __future__ import annotations

import os

import pytest

from model_worker.engine.ops.cpu.build import build_library, find_compiler
from model_worker.engine.ops.cpu.machine_level import MachineLevel, machine_levels
from model_worker.engine.ops.cpu.program import KernelLibrary, Team
from registry.paths import default_cache_dir


@pytest.fixture(scope="session", params=machine_levels(), ids=lambda level: level.name)
def kernels(request: pytest.FixtureRequest) -> KernelLibrary:
    """The kernels of one level; a test that asks for them runs once for each."""
    return _library(request.param)


@pytest.fixture(scope="session")
def best_kernels() -> KernelLibrary:
    """The kernels of the best level, for what does not depend on the level."""
    return _library(machine_levels()[0])


@pytest.fixture(scope="session")
def team(kernels: KernelLibrary) -> Team:
    """Two threads."""
    return Team(kernels, 2)


def _library(level: MachineLevel) -> KernelLibrary:
    if find_compiler() is None:
        pytest.skip("there is no C++ compiler")
    return KernelLibrary(build_library(level, default_cache_dir(os.environ)), level)

"""A machine runs a level only if it has all instructions that the compiler may use for it."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Callable, Collection
from types import MappingProxyType

import pytest
import torch

from model_worker.engine.ops.cpu.build import find_compiler
from model_worker.engine.ops.cpu.machine_level import PORTABLE, X86_LEVELS, MachineLevel, machine_levels

# What the compiler calls a set of instructions, and torch.
_NAMES = {
    "__POPCNT__": "popcnt",
    "__LZCNT__": "lzcnt",
    "__BMI__": "bmi",
    "__BMI2__": "bmi2",
    "__F16C__": "f16c",
    "__FMA__": "fma3",
    "__AVX2__": "avx2",
    "__AVX512F__": "avx512_f",
    "__AVX512BW__": "avx512_bw",
    "__AVX512CD__": "avx512_cd",
    "__AVX512DQ__": "avx512_dq",
    "__AVX512VL__": "avx512_vl",
    "__AVX512VNNI__": "avx512_vnni",
    "__AVX512VBMI__": "avx512_vbmi",
    "__AVX512IFMA__": "avx512_ifma",
    "__AVX512BF16__": "avx512_bf16",
    "__AVX512FP16__": "avx512_fp16",
    "__AVXVNNI__": "avx_vnni",
    "__AMX_TILE__": "amx_tile",
}

SetMachine = Callable[[str, Collection[str]], None]


@pytest.fixture
def set_machine(monkeypatch: pytest.MonkeyPatch) -> SetMachine:
    """Pretends another machine: its name, and the instructions that it has."""

    def set_it(machine: str, capabilities: Collection[str]) -> None:
        monkeypatch.setattr(platform, "machine", lambda: machine)
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: MappingProxyType(dict.fromkeys(capabilities, True)))

    return set_it


@pytest.mark.parametrize("level", X86_LEVELS, ids=lambda level: level.name)
def test_a_level_asks_for_all_that_its_flags_allow(level: MachineLevel) -> None:
    compiler = find_compiler()
    if compiler is None or platform.machine() != "x86_64":
        pytest.skip("there is no C++ compiler for x86")
    command = [compiler, *level.compiler_flags, "-dM", "-E", "-x", "c++", "/dev/null"]
    defined = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert {_NAMES[macro] for macro in defined if macro in _NAMES} == set(level.capabilities)


def test_the_best_level_comes_first(set_machine: SetMachine) -> None:
    best = X86_LEVELS[0]
    set_machine("x86_64", best.capabilities)
    assert machine_levels() == (*X86_LEVELS, PORTABLE)


@pytest.mark.parametrize("missing", sorted(X86_LEVELS[0].capabilities))
def test_what_the_machine_lacks_is_not_used(set_machine: SetMachine, missing: str) -> None:
    set_machine("x86_64", set(X86_LEVELS[0].capabilities) - {missing})
    levels = machine_levels()
    assert levels[-1] is PORTABLE
    assert all(missing not in level.capabilities for level in levels)


def test_other_machines_run_what_needs_no_instructions(set_machine: SetMachine) -> None:
    set_machine("aarch64", X86_LEVELS[0].capabilities)
    assert machine_levels() == (PORTABLE,)

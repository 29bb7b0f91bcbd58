"""Which instructions the CPU kernels may use. The same sources are built for each level (simd.h, build.py)."""

from __future__ import annotations

import platform
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class MachineLevel:
    """One set of instructions.

    Attributes:
        name: part of the file name of the built library.
        compiler_flags: that allow the instructions; never -march=native: the cache may be shared by machines.
        capabilities: of `torch.cpu.get_capabilities`, all that the flags allow: hypervisors may hide any of them.
        has_integer_dot: products of 8-bit integers are summed in hardware, so that activations are quantized too.
    """

    name: str
    compiler_flags: tuple[str, ...]
    capabilities: tuple[str, ...]
    has_integer_dot: bool = False


_AVX2 = ("avx2", "fma3", "f16c", "bmi", "bmi2", "lzcnt", "popcnt")
_AVX512 = (*_AVX2, "avx512_f", "avx512_bw", "avx512_vl", "avx512_dq", "avx512_cd")
X86_LEVELS = (
    MachineLevel(
        "avx512vnni",
        ("-march=x86-64-v4", "-mavx512vnni", "-mprefer-vector-width=512"),
        (*_AVX512, "avx512_vnni"),
        has_integer_dot=True,
    ),
    MachineLevel("avx512", ("-march=x86-64-v4", "-mprefer-vector-width=512"), _AVX512),
    MachineLevel("avx2", ("-march=x86-64-v3",), _AVX2),
)
PORTABLE = MachineLevel("portable", (), ())


def machine_levels() -> tuple[MachineLevel, ...]:
    """The levels that this machine can run, best first."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return (PORTABLE,)
    capabilities = torch.cpu.get_capabilities()
    levels = [level for level in X86_LEVELS if all(capabilities.get(name, False) for name in level.capabilities)]
    return (*levels, PORTABLE)

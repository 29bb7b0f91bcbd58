"""Finding the kernels of this machine."""

from __future__ import annotations

from pathlib import Path

from model_worker.engine.ops.cpu.build import build_library, cached_library, find_compiler
from model_worker.engine.ops.cpu.machine_level import machine_levels
from model_worker.engine.ops.cpu.program import KernelLibrary


def find_kernels(cache_dir: Path, *, required: bool = False) -> KernelLibrary | None:
    """The kernels for the best level of this machine, if they have been built.

    Args:
        required: nothing else will do: build them where they have not been, if there is a compiler. Takes some seconds.

    Raises:
        InternalError: a built library cannot be loaded, or building fails.
    """
    if required and find_compiler() is not None:
        return build_kernels(cache_dir)
    level = machine_levels()[0]
    path = cached_library(level, cache_dir)
    return None if path is None else KernelLibrary(path, level)


def build_kernels(cache_dir: Path) -> KernelLibrary:
    """The kernels for the best level of this machine; built in some seconds where they have not been before.

    Raises:
        InternalError: they cannot be built.
    """
    level = machine_levels()[0]
    return KernelLibrary(build_library(level, cache_dir), level)

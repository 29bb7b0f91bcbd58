"""Building the CPU kernels with the system's C++ compiler, once for each machine level, into a cache.

The file name holds a digest of everything that the result depends on (sources, compiler, flags), so a cached library is
never stale, and two processes that build at the same time do each other no harm.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

from model_worker.engine.ops.cpu.machine_level import MachineLevel
from registry.errors import InternalError

logger = logging.getLogger(__name__)

_OPS = Path(__file__).parent.parent
_COMPILERS = ("c++", "g++", "clang++")
# Traps and errno are never looked at; that, unlike -ffast-math, changes no result and no state of the process.
_FLAGS = ("-std=c++20", "-O3", "-shared", "-fPIC", "-pthread", "-fno-math-errno", "-fno-trapping-math")


def find_compiler() -> str | None:
    """The system's C++ compiler; None: there is none."""
    return next((found for name in _COMPILERS if (found := shutil.which(name)) is not None), None)


def cached_library(level: MachineLevel, cache_dir: Path) -> Path | None:
    """The library of a level, if it has been built from these sources already."""
    compiler = find_compiler()
    if compiler is None:
        return None
    path = _path(level, cache_dir, compiler)
    return path if path.exists() else None


def build_library(level: MachineLevel, cache_dir: Path) -> Path:
    """Build the library of a level, or find it built. Takes seconds.

    Raises:
        InternalError: there is no compiler, or it failed; holds the end of what it printed.
    """
    compiler = find_compiler()
    if compiler is None:
        raise InternalError(f"There is no C++ compiler ({', '.join(_COMPILERS)}); install one, such as g++.")
    path = _path(level, cache_dir, compiler)
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".building-") as directory:
        built = Path(directory) / path.name
        command = [compiler, *_FLAGS, *level.compiler_flags, "-o", str(built), *map(str, _sources())]
        logger.info("Building the CPU kernels for %s.", level.name)
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode != 0:
            raise InternalError(f"Building the CPU kernels failed: {' '.join(command)}\n{result.stderr[-4000:]}")
        os.replace(built, path)
    return path


def _path(level: MachineLevel, cache_dir: Path, compiler: str) -> Path:
    digest = hashlib.sha256()
    for file in [*_sources(), *sorted(_OPS.glob("*/*.h"))]:
        digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    digest.update("\0".join((version, platform.machine(), *_FLAGS, *level.compiler_flags)).encode())
    return cache_dir / "kernels" / f"{level.name}-{digest.hexdigest()[:24]}.so"


def _sources() -> list[Path]:
    return sorted(_OPS.glob("*/*.cpp"))

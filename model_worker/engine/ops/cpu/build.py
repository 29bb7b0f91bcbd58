"""Building the CPU kernels with the system's C++ compiler, once for each machine level, into a cache.

    CACHE/kernels/avx512vnni-8f0c11d2a4b97e35-51d6c7a02be94f18.so
                  level      key              content

The key is a digest of all that the result depends on: sources, flags, machine, C library. So a cached library is never
stale, and one that was built where there is a compiler serves where there is none. The digest of its own content tells
a damaged file, which would crash the process that loads it. Files appear by renaming, so that processes which build at
the same time do each other no harm.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
import threading
import time
from pathlib import Path

from model_worker.engine.ops.cpu.machine_level import MachineLevel
from registry.errors import InternalError

logger = logging.getLogger(__name__)

_OPS = Path(__file__).parent.parent
_COMPILERS = ("c++", "g++", "clang++")
# Traps and errno are never looked at; that, unlike -ffast-math, changes no result and no state of the process.
_FLAGS = (
    "-std=c++20",
    "-O3",
    "-shared",
    "-fPIC",
    "-pthread",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility-inlines-hidden",
)
_MAX_LIBRARIES = 3  # that are kept of each level: those of other versions of the sources are needed no more
_UNFINISHED = ".building-"
_MAX_UNFINISHED_AGE_S = 3600.0


def find_compiler() -> str | None:
    """The system's C++ compiler; None: there is none."""
    return next((found for name in _COMPILERS if (found := shutil.which(name)) is not None), None)


def cached_library(level: MachineLevel, cache_dir: Path) -> Path | None:
    """The library of a level, if it has been built from these sources already. Takes a millisecond."""
    for path in (cache_dir / "kernels").glob(f"{level.name}-{_key(level)}-*.so"):
        try:
            if path.stem.endswith(f"-{_content_digest(path)}"):
                return path
        except FileNotFoundError:
            continue  # another process has removed it just now
        logger.warning("The CPU kernels in %s are damaged; they are removed, to be built again.", path)
        with contextlib.suppress(OSError):
            path.unlink()
    return None


def build_library(level: MachineLevel, cache_dir: Path, *, low_priority: bool = False) -> Path:
    """Build the library of a level, or find it built. Takes some ten seconds.

    Args:
        low_priority: let whatever else wants to compute go first.

    Raises:
        InternalError: there is no compiler, or it failed (its first error first, then all that it printed), or the
            cache cannot be written.
    """
    cached = cached_library(level, cache_dir)
    if cached is not None:
        return cached
    compiler = find_compiler()
    if compiler is None:
        raise InternalError(f"There is no C++ compiler ({', '.join(_COMPILERS)}); install one, such as g++.")
    directory = cache_dir / "kernels"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory, prefix=_UNFINISHED) as unfinished:
            built = Path(unfinished) / "kernels.so"
            key = _key(level)
            _compile(compiler, level, built, low_priority=low_priority)
            if key != _key(level):
                raise InternalError("The sources of the CPU kernels changed while they were compiled; try again.")
            path = directory / f"{level.name}-{key}-{_content_digest(built)}.so"
            os.replace(built, path)
    except OSError as error:
        raise InternalError(
            f"The CPU kernels cannot be kept in {directory} ({error}); let XDG_CACHE_HOME name a directory that can be "
            "written."
        ) from error
    _remove_old(directory, level)
    return path


def start_background_build(level: MachineLevel, cache_dir: Path) -> threading.Thread:
    """Build the library of a level while the process does other things; the log says how it ended.

    Returns:
        the thread that does it, which does not keep the process from ending.
    """

    def build() -> None:
        try:
            build_library(level, cache_dir, low_priority=True)
        except InternalError as error:
            logger.warning("There are no CPU kernels, and the slower route serves. %s", error)
        else:
            logger.info("The CPU kernels are built; restart the worker to use them.")

    thread = threading.Thread(target=build, name="build-cpu-kernels", daemon=True)
    thread.start()
    return thread


def _compile(compiler: str, level: MachineLevel, output: Path, *, low_priority: bool) -> None:
    command = [compiler, *_FLAGS, *level.compiler_flags, "-o", str(output), *map(str, _sources())]
    nice = shutil.which("nice") if low_priority else None
    if nice is not None:
        command = [nice, *command]
    logger.info("Building the CPU kernels for %s.", level.name)
    result = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if result.returncode != 0:
        errors = [line for line in result.stderr.splitlines() if "error" in line]
        why = errors[0] if errors else f"{compiler} ended with status {result.returncode}"
        raise InternalError(f"Building the CPU kernels failed: {why}\n{' '.join(command)}\n{result.stderr[-4000:]}")


def _remove_old(directory: Path, level: MachineLevel) -> None:
    """Other processes may do the same at the same time, or use what is removed, which does them no harm."""
    with contextlib.suppress(OSError):
        newest_first = sorted(directory.glob(f"{level.name}-*.so"), key=lambda path: path.stat().st_mtime, reverse=True)
        for path in newest_first[_MAX_LIBRARIES:]:
            path.unlink(missing_ok=True)
        for unfinished in directory.glob(f"{_UNFINISHED}*"):
            if time.time() - unfinished.stat().st_mtime > _MAX_UNFINISHED_AGE_S:
                shutil.rmtree(unfinished)


def _key(level: MachineLevel) -> str:
    digest = hashlib.sha256()
    for file in [*_sources(), *sorted(_OPS.glob("*/*.h"))]:
        name = f"{file.parent.name}/{file.name}"
        digest.update(name.encode() + b"\0" + hashlib.sha256(file.read_bytes()).digest())
    settings = (platform.machine(), *platform.libc_ver(), *_FLAGS, *level.compiler_flags)
    digest.update("\0".join(settings).encode())
    return digest.hexdigest()[:16]


def _content_digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _sources() -> list[Path]:
    return sorted(_OPS.glob("*/*.cpp"))

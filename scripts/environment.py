"""Sets up what the scripts need: a virtual environment, CPU kernels, the small model, a browser for the tests.

Standard library only. Everything is idempotent: a second call finds what the first one made and returns at once.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
SMALL_MODEL = "smollm2-135m-instruct"

MIN_PYTHON = (3, 11)
MAX_PYTHON = (3, 13)
CPU_TORCH = "torch==2.13.0"
FREE_GIB_FOR_INSTALL = 4.0
COMPILERS = ("c++", "g++", "clang++")  # as in model_worker/engine/ops/cpu/build.py


def fail(message: str) -> NoReturn:
    """End with one clear line."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(1)


def say(message: str) -> None:
    print(message, flush=True)


def prepare(extras: str) -> Path:
    """Make the virtual environment with these extras (as in `webui,dev`), unless it is there; returns its Python."""
    with _lock():
        stamp = VENV / ".rootgraft-setup"
        wanted = _fingerprint()
        done = stamp.read_text().split("\n") if stamp.is_file() else [""]
        installed = set(done[1].split(",")) if done[0] == wanted else set()
        if set(extras.split(",")) <= installed and PYTHON.is_file():
            return PYTHON
        _require_space(ROOT, FREE_GIB_FOR_INSTALL)
        if not PYTHON.is_file():
            _make_venv()
        torch = "torch>=2.11,<2.14" if _has_cuda() else CPU_TORCH
        every = ",".join(sorted(installed | set(extras.split(","))))
        gpu = ",gpu" if _has_cuda() else ""
        say(f"Installing packages ({torch}, then rootgraft[{every}{gpu}]); the first time takes a few minutes ...")
        _pip("install", torch)
        _pip("install", "-e", f"{ROOT}[{every}{gpu}]")
        stamp.write_text(f"{wanted}\n{every}")
        return PYTHON


def prepare_small_model() -> Path:
    """Fetch the small model into the cache and convert it to safetensors once; returns the directory.

    Both commands show their progress, return at once when there is nothing to do, and print one line on failure.
    """
    fetched = _run_for_last_line([str(PYTHON), "-m", "registry", "fetch", SMALL_MODEL])
    source = Path(fetched)
    target = source.parent / f"{SMALL_MODEL}-safetensors"
    if not target.is_dir():
        _require_space(source.parent, 1.0)
        _run_for_last_line([str(PYTHON), "-m", "adapters", "convert", str(source), str(target)])
    return target


def prepare_kernels() -> None:
    """Build the engine's CPU kernels into the cache, unless they are there; installs a compiler for it where it may.

    Workers do without them, slower, so whatever is lacking is said and is no failure.
    """
    stamp = VENV / ".rootgraft-kernels"
    wanted = _kernels_fingerprint()
    done = stamp.read_text().split("\n") if stamp.is_file() else [""]
    if done[0] == wanted and Path(done[-1]).is_file():
        return
    obstacle = None if _has_compiler() else _try_apt_install("g++", purpose="the CPU kernels")
    if obstacle is None:
        say("Building the CPU kernels; the first time takes some ten seconds ...")
        command = [str(PYTHON), "-m", "model_worker.engine.ops.cpu"]
        built = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
        if built.returncode == 0:
            stamp.write_text(f"{wanted}\n{_last_line(built.stdout)}")
            return
        obstacle = built.stderr.split("\n")[0].removeprefix("error: ")
    say(f"There are no CPU kernels, so the engine serves by a slower route. {obstacle}")


def prepare_compiler() -> None:
    """Install a C++ compiler for the tests of the CPU kernels, unless there is one."""
    if not _has_compiler():
        _apt_install("g++", purpose="the tests of the CPU kernels")


def prepare_browser() -> None:
    """Install Debian's Chromium for the browser tests, unless there is one."""
    if shutil.which("chromium") is None:
        _apt_install("chromium", purpose="the browser tests")


# ---------------------------------------------------------------------------------------------- internal


@contextlib.contextmanager
def _lock() -> Iterator[None]:
    with open(ROOT / ".setup.lock", "w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("Another set-up is running in this checkout; waiting for it ...")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _fingerprint() -> str:
    """Changes when the project's requirements change or the checkout moves."""
    content = (ROOT / "pyproject.toml").read_bytes() + str(ROOT).encode() + str(_has_cuda()).encode()
    return hashlib.sha256(content).hexdigest()


def _kernels_fingerprint() -> str:
    """Changes when the kernels' sources change or the cache directory moves."""
    digest = hashlib.sha256(f"{os.environ.get('XDG_CACHE_HOME')}\0{os.environ.get('HOME')}".encode())
    ops = ROOT / "model_worker" / "engine" / "ops"
    for file in sorted([*ops.glob("*/*.cpp"), *ops.glob("*/*.h"), *ops.glob("cpu/*.py")]):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()


def _has_compiler() -> bool:
    return any(shutil.which(name) is not None for name in COMPILERS)


def _has_cuda() -> bool:
    if shutil.which("nvidia-smi") is None:
        return False
    return subprocess.run(["nvidia-smi", "-L"], capture_output=True, check=False).stdout.startswith(b"GPU")


def _require_space(where: Path, gib: float) -> None:
    free = shutil.disk_usage(where).free / 2**30
    if free < gib:
        fail(f"{where} has {free:.1f} GiB free, but {gib:.0f} GiB are needed; free some space and run this again.")


def _make_venv() -> None:
    python = _find_python()
    say(f"Making a virtual environment in {VENV.name} with {python} ...")
    made = subprocess.run([python, "-m", "venv", str(VENV)], capture_output=True, text=True, check=False)
    if made.returncode != 0 and "ensurepip" in made.stdout + made.stderr:
        _apt_install("python3-venv", purpose="virtual environments")
        made = subprocess.run([python, "-m", "venv", str(VENV)], capture_output=True, text=True, check=False)
    if made.returncode != 0:
        fail(f"`{python} -m venv` failed: {_last_line(made.stderr or made.stdout)}")


def _find_python() -> str:
    if MIN_PYTHON <= sys.version_info[:2] <= MAX_PYTHON:
        return sys.executable
    for minor in range(MAX_PYTHON[1], MIN_PYTHON[1] - 1, -1):
        found = shutil.which(f"python3.{minor}")
        if found:
            return found
    fail(
        "Python 3.11, 3.12 or 3.13 is needed and none was found; on Debian: apt-get install python3.11 python3.11-venv"
    )


def _apt_install(package: str, *, purpose: str) -> None:
    obstacle = _try_apt_install(package, purpose=purpose)
    if obstacle is not None:
        fail(obstacle)


def _try_apt_install(package: str, *, purpose: str) -> str | None:
    """-> why it is not installed, and what to do; None: it is."""
    if shutil.which("apt-get") is None or os.geteuid() != 0:
        return f"{package} is needed for {purpose}: install it with your system's package manager and run this again."
    say(f"Installing {package} for {purpose} ...")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (["apt-get", "update"], ["apt-get", "install", "-y", package]):
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        if done.returncode != 0:
            return f"`{' '.join(command)}` failed: {_last_line(done.stderr)}"
    return None


def _pip(*arguments: str) -> None:
    """Run pip with a line for each package it gets; its full output is kept for the case that it fails."""
    command = [str(PYTHON), "-m", "pip", *arguments, "--disable-pip-version-check", "--no-input"]
    lines: list[str] = []
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        lines.append(line.rstrip())
        if line.startswith(("Collecting", "Downloading", "  Downloading", "Installing", "Building")):
            say("  " + line.strip()[:110])
    if process.wait() != 0:
        log = ROOT / ".setup.log"
        log.write_text("\n".join(lines))
        errors = [line for line in lines if line.startswith("ERROR")] or lines[-1:]
        hint = _pip_hint("\n".join(lines))
        fail(
            f"pip could not install what is needed: {errors[0] if errors else 'no output'} "
            f"{hint}(all of it: {log.name})"
        )


def _pip_hint(output: str) -> str:
    if "No space left" in output:
        return "The disk is full. "
    if any(sign in output for sign in ("connection broken by", "Failed to establish a new connection")):
        return "The package index cannot be reached: check the network or pip's configuration. "
    return ""


def _run_for_last_line(command: list[str]) -> str:
    """Run one of our own commands, its progress shown, and return the last line that it printed on standard output."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    last: str | None = None
    assert process.stdout is not None
    for line in process.stdout:
        last = line.strip() or last
    if process.wait() != 0:
        raise SystemExit(1)  # the command has said why, in one line
    if last is None:
        fail(f"`{' '.join(command[1:])}` printed nothing.")
    return last


def _last_line(text: str) -> str:
    lines = [line for line in text.strip().splitlines() if line.strip()]
    return lines[-1] if lines else "no output"

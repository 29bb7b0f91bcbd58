"""What an 8B model launches fits into an H200; of the kernels a few are compiled here, and all by the command."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.model_worker.engine.ops.compile_launches import Compiled

KERNELS = ("attend_kernel", "rotate_and_write_kernel")


def test_launches_of_a_llama_8b(tmp_path: Path) -> None:
    """In a process of its own: elsewhere kernels are interpreted."""
    pytest.importorskip("triton")
    settings = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(["", *sys.path])}
    settings.pop("TRITON_INTERPRET", None)
    chosen = [argument for kernel in KERNELS for argument in ("--kernel", kernel)] + ["--capability", "90"]
    done = subprocess.run(
        [sys.executable, "-m", "tests.model_worker.engine.ops.compile_launches", "--form", "llama", *chosen],
        cwd=Path(__file__).parents[4],
        env=settings,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("sm_90 ") >= 4  # attention of decode steps, of prompts and of a mixture; rotary


def test_what_does_not_fit_is_told() -> None:
    fits = Compiled(shared_bytes=227 * 1024, num_registers=255, spilled_bytes=0, num_warps=8)
    assert fits.problems(90) == []
    assert fits.problems(80) == [f"{227 * 1024} bytes of shared memory"]
    assert Compiled(0, 255, 96, 16).problems(90) == ["255 registers of 16 warps", "96 bytes spilled"]

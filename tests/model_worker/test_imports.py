"""What a worker does not import: each of these would take longer than loading a small model."""

from __future__ import annotations

import subprocess
import sys

_SLOW = ("transformers", "sympy", "torch._dynamo", "torch._inductor", "torch.distributed.tensor", "accelerate")


def test_a_worker_with_a_native_model_imports_nothing_slow() -> None:
    code = "import sys, model_worker.__main__; print(*sys.modules, sep='\\n')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    imported = set(done.stdout.split())
    assert "model_worker.engine.models.native_decoder" in imported
    assert imported.isdisjoint(_SLOW)

"""What a worker does not import: each of these would take longer than loading a small model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

_SLOW = ("transformers", "sympy", "torch._dynamo", "torch._inductor", "torch.distributed.tensor", "accelerate")
_PROGRAM = """
import sys
import model_worker.__main__
from adapters import plan_load
from model_worker.engine.models.decoder_spec import read_spec

plan = plan_load(sys.argv[1], native_model_types={"llama"})
read_spec(plan.config, plan.max_model_len)
print(*sys.modules, sep="\\n")
"""


def test_a_worker_with_a_native_model_imports_nothing_slow(smollm2_dir: Path, smollm2_gguf: Path) -> None:
    for path in (smollm2_dir, smollm2_gguf):
        command = [sys.executable, "-c", _PROGRAM, str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        imported = set(done.stdout.split())
        assert "model_worker.engine.models.native_decoder" in imported
        assert imported.isdisjoint(_SLOW)

"""Has the benchmarks for GPUs run on a CPU: a tiny model, few tokens, and a device that only seems to be there.

    python tests/benchmarks/gpu_rehearsal.py gpu_engine.py --checkpoint DIR --json FILE

All that they do is done but what CUDA does: models are computed by `GpuDecoder` on CPU tensors with the ops'
references, steps run ahead, graphs are functions that are called again, and samples are drawn by the code for GPUs. The
figures mean nothing; that there are some, and that no line of the benchmarks fails, is what is seen.
"""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
NAMES = (
    "gpu_figures", "gpu_ceilings", "gpu_checkpoint", "gpu_steps", "gpu_engine", "gpu_compile", "gpu_attention",
    "gpu_variants", "gpu_quantized", "gpu_peers",
)  # fmt: skip
_MODEL = {
    "vocab_size": 600,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
_CONSTANTS: dict[str, dict[str, Any]] = {
    "gpu_ceilings": {"_COPIED_BYTES": 1 << 16, "_MATRIX": 32},
    "gpu_steps": {
        "_TRACED": torch.profiler.ProfilerActivity.CPU,
        "_TRACED_DEVICE": torch.autograd.DeviceType.CPU,
    },
    "gpu_engine": {
        "CONTEXT": 64,
        "NUM_STEPS": 6,
        "DECODE_TARGETS": {1: 0.85, 5: 0.8},
        "PROMPT_TOKENS": 200,
        "TRACED_ROWS": 3,
        "NUM_REQUESTS": 12,
        "TOKENS_IN": 20,
        "TOKENS_OUT": 5,
        "MAX_MODEL_LEN": 512,
        "MAX_NUM_SEQS": 8,
    },
    "gpu_attention": {
        "DECODES": ((1, 64), (3, 40)),
        "TARGET_SHAPE": (2, 64),
        "PROMPT_TOKENS": 50,
        "UNCACHED_BYTES": 1 << 19,
    },
    "gpu_variants": {
        "CONTEXT": 64,
        "NUM_STEPS": 6,
        "MEMORY_GIB": 0.5,
        "PROMPT_TOKENS": 100,
        "LORA_TARGETS": {2: 0.9, 5: 0.7},
        "MIXED_ROWS": 4,
        "SIGN_TARGETS": {1: 0.9, 3: 0.6},
        "NUM_SIGNS": 5,
        "ZIPF_ROWS": 6,
        "SEPARATE_TARGETS": {3: 2.0},
    },
    "gpu_quantized": {"CONTEXT": 64, "NUM_STEPS": 6},
    "gpu_compile": {"COMMAND": [sys.executable, __file__, "gpu_compile.py"]},
    "gpu_peers": {"BATCHING": {"num_blocks": 16, "max_batch_tokens": 64, "use_async_batching": False}},
}


class _Event:
    """Of a device that has done everything at once."""

    def __init__(self, **_: object) -> None:
        self._time_s = 0.0

    def record(self, *_: object) -> None:
        self._time_s = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, later: _Event) -> float:
        return max(1e-6, (later._time_s - self._time_s) * 1000)


class _Graph:
    """What was launched while it was captured is not launched again: that would take a Python that records itself."""

    def replay(self) -> None:
        pass


@contextmanager
def _captured(graph: _Graph) -> Iterator[None]:
    yield


def rehearse(monkeypatch: pytest.MonkeyPatch) -> dict[str, ModuleType]:
    """The scripts, made small, on a CPU. Their own directory has to be on the path, as when they are run."""
    modules = {name: importlib.import_module(name) for name in NAMES}
    for key, value in _MODEL.items():
        monkeypatch.setitem(modules["gpu_checkpoint"].LLAMA_8B, key, value)
    constants = {name: value for of_module in _CONSTANTS.values() for name, value in of_module.items()}
    shared = {"MAX_MODEL_LEN", "NUM_REQUESTS", "TOKENS_IN", "TOKENS_OUT"}  # others have them of gpu_engine
    for name, module in modules.items():
        own = _CONSTANTS.get(name, {})
        for key in {*own, *(shared & vars(module).keys())}:
            monkeypatch.setattr(module, key, own.get(key, constants[key]))
        if hasattr(module, "DEVICE"):
            monkeypatch.setattr(module, "DEVICE", "cpu")
    for name, value in {
        "synchronize": lambda *_: None,
        "empty_cache": lambda: None,
        "Event": _Event,
        "CUDAGraph": _Graph,
        "graph": _captured,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    # Imported here because this file may be run before its directory's parents are on the path.
    from tests.fakes.fake_accelerator import pretend_to_have_a_gpu

    pretend_to_have_a_gpu(monkeypatch)
    return modules


def main(script: str, arguments: list[str]) -> int:
    sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as monkeypatch:
        modules = rehearse(monkeypatch)
        return int(modules[script.removesuffix(".py")].main(arguments) or 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))

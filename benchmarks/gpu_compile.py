"""Compile the kernels that the other benchmarks for GPUs use, and write their model: the start that they measure is not
the first one on the machine.

    python benchmarks/gpu_compile.py --checkpoint DIR --json FILE

Kernels depend on the shapes of layers, not on how many there are: a model of one layer is started for each kind of
weights, in processes of their own at the same time, and Triton keeps what they compile.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

from gpu_checkpoint import DEVICE, LLAMA_8B, write_checkpoint
from gpu_engine import MAX_MODEL_LEN, engine_config
from gpu_figures import Figure, Findings

from model_worker.engine.config import CacheConfig
from model_worker.engine.llm import LLM

KINDS = ("none", "fp8", "int4")
COMMAND = [sys.executable, __file__]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--checkpoint", type=Path, required=True, help="directory of the model of random weights")
    parser.add_argument("--json", type=Path, help="where the figure is written")
    parser.add_argument("--only", choices=KINDS, help="compile for these weights, in this process")
    options = parser.parse_args(arguments)
    small = options.checkpoint.with_name(f"{options.checkpoint.name}-of-one-layer")
    if options.only is not None:
        compile_kernels(small, options.only)
        return 0
    begin_s = time.perf_counter()
    write_checkpoint(small, {**LLAMA_8B, "num_hidden_layers": 1}, DEVICE)
    more = ["--checkpoint", str(options.checkpoint), "--only"]
    processes = [subprocess.Popen([*COMMAND, *more, kind]) for kind in KINDS]
    write_checkpoint(options.checkpoint, LLAMA_8B, DEVICE)  # in the meantime
    failed = [kind for kind, process in zip(KINDS, processes, strict=True) if process.wait()]
    figure = Figure("kernels compiled, model written", time.perf_counter() - begin_s, "s")
    findings = Findings(options.json)
    findings.add(figure)
    print(findings.table())
    if failed:
        print(f"error: no model with these weights could be started: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def compile_kernels(checkpoint: Path, quantization: str) -> None:
    """Start a model, which compiles all that it may launch."""
    config = replace(engine_config(), cache=CacheConfig(num_blocks=1024, gpu_memory_utilization=0.25))
    LLM(checkpoint, config, quantization=quantization, max_model_len=MAX_MODEL_LEN).engine.close()


if __name__ == "__main__":
    sys.exit(main())

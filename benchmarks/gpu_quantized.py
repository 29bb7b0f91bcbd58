"""Decode steps at batch 1 with weights of 4 bits and of float8, against those of bfloat16, on a GPU.

    python benchmarks/gpu_quantized.py --checkpoint DIR --json FILE

The bfloat16 checkpoint is quantized while it is read. The models are loaded one after the other, in one process.
"""

from __future__ import annotations

import argparse
import gc
import sys
from pathlib import Path

import torch
from gpu_checkpoint import DEVICE, LLAMA_8B, write_checkpoint
from gpu_figures import Figure, Findings
from gpu_steps import decode_step_s, random_prompts

from model_worker.engine.config import CacheConfig, EngineConfig, SchedulerConfig, SpeculationConfig
from model_worker.engine.llm import LLM

CONTEXT, NUM_STEPS = 1024, 96
TARGETS = {"fp8": 1.6, "int4": 2.5}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--checkpoint", type=Path, required=True, help="directory of the model of random weights")
    parser.add_argument("--json", type=Path, help="where the figures are written, after each one")
    options = parser.parse_args(arguments)
    write_checkpoint(options.checkpoint, LLAMA_8B, DEVICE)
    findings = Findings(options.json)
    plain_s = step_s(options.checkpoint, "none")
    for quantization, target in TARGETS.items():
        seconds = step_s(options.checkpoint, quantization)
        detail = f"{seconds * 1e3:.2f} ms a step, bfloat16 {plain_s * 1e3:.2f} ms"
        findings.add(Figure(f"{quantization} weights, batch 1", plain_s / seconds, "times bfloat16", target, detail))
    print(findings.table())
    return 0


def step_s(checkpoint: Path, quantization: str) -> float:
    """Of a model that is loaded for it and forgotten."""
    config = EngineConfig(
        cache=CacheConfig(num_blocks=1024, swap_space_gib=0.0),
        scheduler=SchedulerConfig(max_num_seqs=1, max_num_batched_tokens=2048),
        speculation=SpeculationConfig(speculation="off"),
    )
    llm = LLM(checkpoint, config, quantization=quantization, max_model_len=4096)
    prompts = random_prompts(1, CONTEXT - NUM_STEPS // 2, LLAMA_8B["vocab_size"])
    seconds = decode_step_s(llm.engine, prompts, num_steps=NUM_STEPS)
    llm.engine.close()
    del llm
    gc.collect()
    torch.cuda.empty_cache()
    return seconds


if __name__ == "__main__":
    torch.manual_seed(0)
    sys.exit(main())

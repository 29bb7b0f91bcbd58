"""The whole engine on a GPU with an 8B model of random weights: start, decode steps, a long prompt, throughput.

    python benchmarks/gpu_engine.py --checkpoint DIR --json FILE

The checkpoint is written to DIR where it is not there yet. Decode steps are compared with the byte floor: all weights
but the embedding, and the rows' keys and values, over the measured bandwidth of a copy; a prompt with the measured rate
of a product of large matrices; the time between steps is that in which no kernel runs, by torch's profiler.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from pathlib import Path

import torch
from gpu_ceilings import Ceilings, measure_ceilings
from gpu_checkpoint import DEVICE, LLAMA_8B, write_checkpoint
from gpu_figures import Figure, Findings
from gpu_steps import (
    decode_floor_s,
    decode_step_s,
    output_tokens_per_s,
    prefill_flops,
    prefill_s,
    random_prompts,
    trace_decoding,
)

from model_worker.engine.config import EngineConfig, SchedulerConfig, SpeculationConfig
from model_worker.engine.llm import LLM

CONTEXT = 1024
NUM_STEPS = 96
DECODE_TARGETS = {1: 0.85, 32: 0.80, 128: 0.75}
PROMPT_TOKENS, PREFILL_TARGET = 8192, 0.65
TRACED_ROWS, GAP_TARGET = 32, 0.03
START_TARGET_S = 30.0
NUM_REQUESTS, TOKENS_IN, TOKENS_OUT = 512, 512, 256
MAX_MODEL_LEN = 8448
MAX_NUM_SEQS = 256


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--checkpoint", type=Path, required=True, help="directory of the model of random weights")
    parser.add_argument("--json", type=Path, help="where the figures are written, after each one")
    options = parser.parse_args(arguments)
    before_s = seconds_of_process()
    write_checkpoint(options.checkpoint, LLAMA_8B, DEVICE)
    ceilings = measure_ceilings()
    findings = Findings(options.json)
    begin_s = time.perf_counter()
    llm = LLM(options.checkpoint, engine_config(), max_model_len=MAX_MODEL_LEN)
    start_s = before_s + time.perf_counter() - begin_s
    findings.add(Figure("start, to ready, files in the page cache", start_s, "s", START_TARGET_S, at_most=True))
    for num_rows in DECODE_TARGETS:
        findings.add(decode(llm, num_rows, ceilings))
    findings.add(launch_gaps(llm))
    findings.add(prefill(llm, ceilings))
    findings.add(throughput(llm))
    print(findings.table())
    return 0


def engine_config() -> EngineConfig:
    """For throughput; drafts would make a step's tokens a matter of luck."""
    return EngineConfig(
        scheduler=SchedulerConfig(
            max_num_seqs=MAX_NUM_SEQS, max_num_batched_tokens=PROMPT_TOKENS, max_mixed_prefill_tokens=PROMPT_TOKENS
        ),
        speculation=SpeculationConfig(speculation="off"),
    )


def decode(llm: LLM, num_rows: int, ceilings: Ceilings) -> Figure:
    prompts = random_prompts(num_rows, CONTEXT - NUM_STEPS // 2, LLAMA_8B["vocab_size"], seed=num_rows)
    step_s = decode_step_s(llm.engine, prompts, num_steps=NUM_STEPS)
    floor_s = decode_floor_s(LLAMA_8B, num_rows, CONTEXT, ceilings)
    return Figure(
        f"decode, batch {num_rows}, context {CONTEXT:,}",
        floor_s / step_s,
        "of the byte floor",
        DECODE_TARGETS[num_rows],
        f"{step_s * 1e3:.2f} ms a step, floor {floor_s * 1e3:.2f} ms at {ceilings.copy_bytes_s / 1e12:.2f} TB/s",
    )


def launch_gaps(llm: LLM) -> Figure:
    prompts = random_prompts(TRACED_ROWS, CONTEXT, LLAMA_8B["vocab_size"], seed=1000)
    busy = trace_decoding(llm.engine, prompts, num_steps=20)
    return Figure(
        f"launch gaps, batch {TRACED_ROWS}",
        busy.waiting / busy.span,
        "of a decode step",
        GAP_TARGET,
        f"gaps over 3 us, in which nothing was launched; all gaps: {busy.idle / busy.span:.1%}",
        at_most=True,
    )


def prefill(llm: LLM, ceilings: Ceilings) -> Figure:
    prompts = random_prompts(4, PROMPT_TOKENS, LLAMA_8B["vocab_size"], seed=2000)
    seconds = statistics.median([prefill_s(llm.engine, prompt) for prompt in prompts][1:])
    rate = prefill_flops(LLAMA_8B, PROMPT_TOKENS) / seconds
    return Figure(
        f"prefill, {PROMPT_TOKENS:,} tokens",
        rate / ceilings.bf16_flops,
        "of the matmul rate",
        PREFILL_TARGET,
        f"{seconds * 1e3:.0f} ms to the first token, {rate / 1e12:,.0f} of {ceilings.bf16_flops / 1e12:,.0f} TFLOP/s",
    )


def throughput(llm: LLM) -> Figure:
    output_tokens_per_s(llm.engine, random_prompts(MAX_NUM_SEQS, 64, LLAMA_8B["vocab_size"], seed=3000), 8)
    prompts = random_prompts(NUM_REQUESTS, TOKENS_IN, LLAMA_8B["vocab_size"], seed=4000)
    return Figure(
        f"throughput, {NUM_REQUESTS} requests, {TOKENS_IN} in, {TOKENS_OUT} out",
        output_tokens_per_s(llm.engine, prompts, TOKENS_OUT),
        "tokens/s",
    )


def seconds_of_process() -> float:
    """Since this process was started, imports included."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    started_s = ticks / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started_s


if __name__ == "__main__":
    torch.manual_seed(0)
    sys.exit(main())

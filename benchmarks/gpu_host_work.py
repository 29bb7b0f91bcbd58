"""What the host does for a decode step on a GPU, in microseconds: steps run ahead, and the GPU does nothing.

    PYTHONPATH=. python benchmarks/gpu_host_work.py --json FILE

Everything is as on a GPU but what CUDA does: scheduling, the batch, its copy, a replay that launches nothing, the
launches for samples (of which drawing is an argmax), detokenization, outputs. Time is the thread's own processor time,
so that other programs disturb it less. Copies and launches of a GPU, about twelve a step, take some 10 us each beside
it. A step is launched while the one before it is computed: the GPU waits only where this is longer than a step.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_checkpoint import LLAMA_8B, write_checkpoint
from machine import describe_machine

from model_worker.engine import device_sampler
from model_worker.engine.config import CacheConfig, EngineConfig, SchedulerConfig, SpeculationConfig
from model_worker.engine.layers.attention import ForwardContext
from model_worker.engine.llm import LLM
from model_worker.engine.llm_engine import LLMEngine
from model_worker.engine.ops.sampling.functional import Draws
from model_worker.engine.sampling_params import SamplingParams
from tests.fakes import fake_accelerator

BLOCK_SIZE = 16
CASES = ((32, 1024), (128, 1024), (8, 8192))
NUM_STEPS, REPEATS = 20, 12
_TINY = {
    "vocab_size": 600,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, help="where the result is written")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    results = []
    with tempfile.TemporaryDirectory() as scratch, pytest.MonkeyPatch.context() as monkeypatch:
        checkpoint = write_checkpoint(Path(scratch) / "model", {**LLAMA_8B, **_TINY}, "cpu")
        _pretend(monkeypatch)
        for num_rows, context in CASES:
            steps_us = step_us(_engine(checkpoint, num_rows, context), num_rows, context)
            best, median = min(steps_us), statistics.median(steps_us)
            results.append({"rows": num_rows, "context": context, "best_us": best, "median_us": median})
            print(f"{num_rows} rows, context {context:,}: {best:,.0f} us a step (median {median:,.0f})", flush=True)
    if options.json is not None:
        command = "PYTHONPATH=. python benchmarks/gpu_host_work.py"
        report = {"command": command, "machine": describe_machine(), "results": results}
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


def step_us(engine: LLMEngine, num_rows: int, context: int) -> list[float]:
    """Of some runs of decode steps in which each row gets a token."""
    sampling = SamplingParams(temperature=0.0, max_tokens=(REPEATS + 3) * NUM_STEPS + num_rows, ignore_eos=True)
    for row in range(num_rows):
        engine.add_request(str(row), [(row * 7 + place * 3) % 500 for place in range(context)], sampling)
    streaming: set[str] = set()
    while len(streaming) < num_rows:
        streaming |= {news.request_id for news in engine.step() if news.deltas}
    found = []
    for _ in range(1 + REPEATS):
        begin_s = time.thread_time()
        for _ in range(NUM_STEPS):
            assert len(engine.step()) == num_rows
        found.append((time.thread_time() - begin_s) / NUM_STEPS * 1e6)
    return found[1:]


def _engine(checkpoint: Path, num_rows: int, context: int) -> LLMEngine:
    config = EngineConfig(
        cache=CacheConfig(block_size=BLOCK_SIZE, num_blocks=num_rows * (context // BLOCK_SIZE + 40)),
        scheduler=SchedulerConfig(max_num_seqs=256, max_num_batched_tokens=8192, max_mixed_prefill_tokens=8192),
        speculation=SpeculationConfig(speculation="off"),
        device="cpu",
    )
    return LLM(checkpoint, config, max_model_len=2 * context).engine


class _Idle(fake_accelerator.FakeAccelerator):
    """Whose graphs launch nothing."""

    def active(self) -> AbstractContextManager[None]:
        return nullcontext()

    def capture(self, context: ForwardContext) -> Any:
        def capture(run: Callable[[], None]) -> Callable[[], None]:
            run()
            return lambda: None

        return capture


def _pretend(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model's outputs are what happens to be in memory; so is what is drawn from them."""
    monkeypatch.setattr(fake_accelerator, "FakeAccelerator", _Idle)
    fake_accelerator.pretend_to_have_a_gpu(monkeypatch)

    def draw(logits: torch.Tensor, parameters: torch.Tensor, sorted_rows: torch.Tensor | None = None) -> Draws:
        return Draws(logits[:, 256:].argmax(dim=1) + 256, torch.ones(len(logits), dtype=torch.bool))

    monkeypatch.setattr(device_sampler, "draw_tokens", draw)


if __name__ == "__main__":
    sys.exit(main())

"""A real model worker whose model costs nothing: a step takes a fixed time and gives the next tokens of a fixed text.

    python benchmarks/constant_worker.py STEP_MS --model-path smollm2-135m-instruct [flags of `python -m model_worker`]

Scheduler, block manager, detokenizer, engine thread, event loop and HTTP are those of every worker, and the tokenizer
is the model's; only weights are not read and nothing is computed. The step sleeps, so that other threads and processes
have the cores meanwhile, as they would not beside a real model on the CPU.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace

from adapters import plan_load
from adapters.tokenizer import load_tokenizer
from model_worker.config import parse_config
from model_worker.engine.async_llm_engine import AsyncLLMEngine
from model_worker.engine.config import SpeculationConfig
from model_worker.engine.llm_engine import LLMEngine
from model_worker.engine.outputs import SampledToken
from model_worker.engine.step import SchedulerOutput, StepResult
from model_worker.engine.visibility import Visibility
from model_worker.model_source import find_model
from model_worker.worker import Worker, bind
from registry.paths import default_cache_dir

_NUM_BLOCKS = 8192
_MAX_MODEL_LEN = 8192
_TEXT = (
    "A hash table is a data structure that maps keys to values. It computes an index into an array of buckets from the "
    'key\'s hash, in which the value is looked up: `table[hash("key") % 16] = 42`.\n\n'
    "1. Größe und Überläufe\n2. 衝突 🙂\n"
)


class ConstantExecutor:
    """Takes `step_s` seconds a step and draws the tokens of `text` one after the other, over and over.

    No logprobs, and every prompt is as good as any other.
    """

    def __init__(self, text: Sequence[int], vocab_size: int, step_s: float) -> None:
        self.num_blocks = _NUM_BLOCKS
        self.num_host_blocks = 0
        self.groups = (Visibility(),)
        self.block_size = 16
        self.vocab_size = vocab_size
        self.runs_ahead = False
        self._samples = [SampledToken(token_id, None) for token_id in text]
        self._step_s = step_s

    def execute(self, output: SchedulerOutput) -> StepResult:
        if self._step_s:
            time.sleep(self._step_s)
        samples = self._samples
        return StepResult(
            tuple(
                samples[sequence.num_output_tokens % len(samples)]
                for item in output.scheduled
                for sequence in item.sampled
            ),
            {},
        )


def main(arguments: Sequence[str]) -> int:
    step_s = float(arguments[0]) / 1e3
    config = parse_config(arguments[1:], worker_token=None)
    logging.basicConfig(level=config.log_level.upper())
    source = find_model(config.model, name=config.model_name, cache_dir=default_cache_dir(os.environ), report=print)
    plan = replace(plan_load(source.path), max_model_len=_MAX_MODEL_LEN)
    tokenizer = load_tokenizer(plan.tokenizer_path)
    executor = ConstantExecutor(tokenizer.encode(_TEXT, add_special_tokens=False), tokenizer.vocab_size, step_s)
    died = asyncio.Event()
    engine = AsyncLLMEngine(
        LLMEngine(
            # Its text repeats itself: guesses would always be right, and a step would give many tokens.
            replace(config.engine, speculation=SpeculationConfig(speculation="off")),
            executor,
            tokenizer,
            stop_token_ids=plan.stop_token_ids,
            max_model_len=plan.max_model_len,
        ),
        on_failure=died.set,
    )
    with bind(config.host, config.port) as sock:
        worker = Worker(engine, plan, config, sock, model_name=source.name, engine_died=died)
        return asyncio.run(worker.run())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

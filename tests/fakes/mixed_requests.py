"""Requests of all kinds in a cache that is too small for them, computed together: the answers of a runner."""

from __future__ import annotations

from typing import Any

from model_worker.engine.config import CacheConfig, EngineConfig, SchedulerConfig, SpeculationConfig
from model_worker.engine.llm_engine import LLMEngine
from model_worker.engine.model_runner import ModelRunner
from model_worker.engine.sampling_params import SamplingParams
from tests.fakes.byte_tokenizer import ByteTokenizer

NO_SPECULATION = SpeculationConfig(speculation="off")
SMALL_CACHE = CacheConfig(block_size=4, num_blocks=24)  # so small that sequences are preempted


def mixed_config(
    *, cache: CacheConfig = SMALL_CACHE, speculation: SpeculationConfig = NO_SPECULATION, **more: Any
) -> EngineConfig:
    """Of runners and engines that compute them, with few sequences and short chunks of prompts at a time."""
    scheduler = SchedulerConfig(max_num_seqs=6, max_num_batched_tokens=16)
    return EngineConfig(cache, scheduler, speculation=speculation, **more)


def mixed_answers(runner: ModelRunner, *, speculation: SpeculationConfig = NO_SPECULATION) -> dict[str, list[int]]:
    """The tokens of each choice of each request: greedy and drawn, one choice and two, with a penalty and logprobs."""
    config = mixed_config(speculation=speculation)
    engine = LLMEngine(config, runner, ByteTokenizer(), stop_token_ids=(), max_model_len=64)
    for number in range(9):
        sampling = SamplingParams(
            temperature=0.0 if number % 2 else 1.0,
            n=1 + number % 3 // 2,
            seed=number,
            max_tokens=4 + 3 * number,
            repetition_penalty=1.2 if number == 7 else 1.0,
            prompt_logprobs=1 if number == 3 else None,
        )
        engine.add_request(str(number), [(number * 7 + i) % 50 for i in range(1 + 2 * number)], sampling)
    tokens: dict[str, list[int]] = {}
    while engine.has_unfinished_requests:
        for output in engine.step():
            assert output.error is None, output.error
            for delta in output.deltas:
                tokens.setdefault(f"{output.request_id}.{delta.index}", []).extend(delta.token_ids)
        engine.check_integrity()
    return tokens

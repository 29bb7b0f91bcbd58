"""The native decoder gives a request the same bits alone, in a crowd, in chunks and with guesses on trial."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from model_worker.engine.config import CacheConfig, EngineConfig, SchedulerConfig, SpeculationConfig
from model_worker.engine.llm import LLM
from model_worker.engine.ops.cpu.program import KernelLibrary
from model_worker.engine.outputs import TokenLogprobs
from model_worker.engine.sampling_params import SamplingParams

_PROMPT = "The capital of France is Paris. The capital of Italy is"
_CROWD = [f"{number} {'and so on ' * number}" for number in range(1, 20, 2)]
_CONFIG = EngineConfig(
    CacheConfig(num_blocks=256, enable_prefix_caching=False),
    SchedulerConfig(max_num_batched_tokens=512),
    SpeculationConfig(speculation="off"),
    num_threads=2,
    model_impl="native",
)


def _logprobs(llm: LLM, prompts: list[str]) -> list[TokenLogprobs]:
    """Of the last prompt's prompt and answer."""
    sampling = SamplingParams(temperature=0.0, max_tokens=24, logprobs=3, prompt_logprobs=1, ignore_eos=True)
    generation = llm.generate(prompts, sampling)[-1]
    of_answer, of_prompt = generation.outputs[0].logprobs, generation.prompt_logprobs
    assert of_answer is not None
    assert of_prompt is not None
    return [*(entry for entry in of_prompt if entry is not None), *of_answer]


@pytest.mark.parametrize(
    ("dtype", "quantization"), [("float32", "none"), ("bfloat16", "none"), ("auto", "int8"), ("auto", "int4")]
)
def test_a_request_is_answered_with_the_same_bits(
    smollm2_dir: Path, best_kernels: KernelLibrary, dtype: str, quantization: str
) -> None:
    def load(config: EngineConfig) -> LLM:
        return LLM(smollm2_dir, config, dtype=dtype, quantization=quantization, max_model_len=256)

    crowd = [*_CROWD, _PROMPT]
    llm = load(_CONFIG)
    alone = _logprobs(llm, [_PROMPT])
    assert len(alone) > 24
    assert _logprobs(llm, crowd) == alone
    chunks = SchedulerConfig(max_num_batched_tokens=24, max_num_seqs=len(crowd), max_mixed_prefill_tokens=3)
    guesses = SpeculationConfig()
    config = dataclasses.replace(_CONFIG, scheduler=chunks, speculation=guesses, num_threads=1)
    assert _logprobs(load(config), crowd) == alone

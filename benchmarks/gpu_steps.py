"""Steps of a whole engine on a GPU: how long they take, and when the GPU waits for the host."""

from __future__ import annotations

import random
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from gpu_ceilings import Ceilings
from gpu_checkpoint import decoder_matrix_numbers, head_numbers, kv_bytes_per_token

from model_worker.engine.llm_engine import LLMEngine
from model_worker.engine.lora.lora_weight import LoraWeight
from model_worker.engine.outputs import RequestOutput
from model_worker.engine.sampling_params import SamplingParams

_WARM_UP_STEPS = 8
_MOST_STEPS_BEFORE = 256  # while the other prompts are computed, and to warm up
# Kernels of one graph follow each other within this; a longer gap is one in which nothing was launched.
_LAUNCHED_GAP_US = 3.0
_TRACED, _TRACED_DEVICE = torch.profiler.ProfilerActivity.CUDA, torch.autograd.DeviceType.CUDA


class Busy(NamedTuple):
    """Of a stretch of time on the GPU, in microseconds.

    Attributes:
        span: from the first kernel's start to the last one's end.
        waiting: gaps longer than those between kernels of a graph.
        idle: all gaps.
    """

    span: float
    waiting: float
    idle: float


def random_prompts(num_prompts: int, num_tokens: int, vocab_size: int, seed: int = 0) -> list[list[int]]:
    """Token ids that have nothing in common."""
    source = random.Random(seed)
    return [[source.randrange(256, vocab_size) for _ in range(num_tokens)] for _ in range(num_prompts)]


def decode_step_s(
    engine: LLMEngine,
    prompts: Sequence[list[int]],
    *,
    num_steps: int,
    loras: Sequence[Sequence[LoraWeight]] | None = None,
) -> float:
    """Seconds of a step in which each prompt's request gets one token, all of them computed before.

    Args:
        loras: of each request; None: the base alone.
    """
    with _decoding(engine, prompts, num_steps, loras):
        torch.cuda.synchronize()
        begin_s = time.perf_counter()
        num_tokens = _take(engine, num_steps * len(prompts))
        elapsed_s = time.perf_counter() - begin_s
    return elapsed_s * len(prompts) / num_tokens


def prefill_s(engine: LLMEngine, prompt: list[int], loras: Sequence[LoraWeight] = ()) -> float:
    """Seconds from a prompt's arrival to its first token, with nothing else to do."""
    torch.cuda.synchronize()
    begin_s = time.perf_counter()
    _run(engine, [prompt], 1, loras)
    return time.perf_counter() - begin_s


def output_tokens_per_s(engine: LLMEngine, prompts: list[list[int]], num_new_tokens: int) -> float:
    """Of all requests at once, prompts included in the time."""
    begin_s = time.perf_counter()
    num_tokens = _run(engine, prompts, num_new_tokens)
    return num_tokens / (time.perf_counter() - begin_s)


def trace_decoding(engine: LLMEngine, prompts: Sequence[list[int]], *, num_steps: int) -> Busy:
    """How much of some decode steps the GPU worked, by torch's profiler."""
    with (
        _decoding(engine, prompts, num_steps, None),
        torch.profiler.profile(activities=[_TRACED]) as profiler,
    ):
        _take(engine, num_steps * len(prompts))
        torch.cuda.synchronize()
    kernels = [
        (event.time_range.start, event.time_range.end)
        for event in profiler.events()
        if event.device_type == _TRACED_DEVICE
    ]
    return gaps(kernels)


def gaps(kernels: Iterable[tuple[float, float]]) -> Busy:
    """Begin and end of each piece of work on the GPU, in microseconds; they may overlap."""
    ordered = sorted(kernels)
    if not ordered:
        raise ValueError("the profiler saw no work on the GPU")
    waiting = idle = 0.0
    busy_until = ordered[0][0]
    for begin, end in ordered:
        gap = begin - busy_until
        if gap > 0:
            idle += gap
            waiting += gap if gap > _LAUNCHED_GAP_US else 0.0
        busy_until = max(busy_until, end)
    return Busy(busy_until - ordered[0][0], waiting, idle)


def decode_floor_s(config: dict[str, Any], num_rows: int, context: int, ceilings: Ceilings) -> float:
    """Seconds that a copy of a decode step's bytes takes: all weights but the embedding, and the rows' KV."""
    weight_bytes = 2 * (decoder_matrix_numbers(config) + head_numbers(config))
    return (weight_bytes + num_rows * context * kv_bytes_per_token(config)) / ceilings.copy_bytes_s


def prefill_flops(config: dict[str, Any], num_tokens: int) -> float:
    """Multiplications and additions of a prompt: matrices, the visible half of attention, the head of one row."""
    attention = 2 * num_tokens * (num_tokens + 1) * config["num_attention_heads"] * config["head_dim"]
    matrices = 2 * decoder_matrix_numbers(config) * num_tokens
    return float(matrices + config["num_hidden_layers"] * attention + 2 * head_numbers(config))


@contextmanager
def _decoding(
    engine: LLMEngine, prompts: Sequence[list[int]], num_steps: int, loras: Sequence[Sequence[LoraWeight]] | None
) -> Iterator[None]:
    """Requests of these prompts that have their first tokens, and go on for so many steps at least."""
    sampling = SamplingParams(temperature=0.0, max_tokens=num_steps + _MOST_STEPS_BEFORE, ignore_eos=True)
    try:
        for row, prompt in enumerate(prompts):
            engine.add_request(f"row-{row}", prompt, sampling, loras=() if loras is None else loras[row])
        streaming: set[str] = set()
        while len(streaming) < len(prompts):
            streaming |= {news.request_id for news in _step(engine) if news.deltas}
        _take(engine, _WARM_UP_STEPS * len(prompts))
        yield
    finally:
        for row in range(len(prompts)):
            engine.abort_request(f"row-{row}")
        while engine.has_unfinished_requests:
            engine.step()


def _take(engine: LLMEngine, num_tokens: int) -> int:
    """Run steps until there are so many new tokens. -> how many there are"""
    found = 0
    while found < num_tokens:
        found += sum(len(delta.token_ids) for news in _step(engine) for delta in news.deltas)
    return found


def _run(engine: LLMEngine, prompts: Sequence[list[int]], num_new_tokens: int, loras: Sequence[LoraWeight] = ()) -> int:
    """Answer prompts, all with the same variant. -> new tokens"""
    sampling = SamplingParams(temperature=0.0, max_tokens=num_new_tokens, ignore_eos=True)
    for row, prompt in enumerate(prompts):
        engine.add_request(f"prompt-{row}", prompt, sampling, loras=loras)
    num_tokens = 0
    while engine.has_unfinished_requests:
        num_tokens += sum(len(delta.token_ids) for news in _step(engine) for delta in news.deltas)
    return num_tokens


def _step(engine: LLMEngine) -> list[RequestOutput]:
    """One step, in which no request may fail."""
    if engine.stalled:
        engine.wait_for_adapters()
    outputs = engine.step()
    for news in outputs:
        if news.error is not None:
            raise news.error
    return outputs

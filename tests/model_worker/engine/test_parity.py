"""Greedy tokens of the whole engine equal those of transformers' `generate`, for every family that is served.

Each family runs through transformers' modeling code, and again through the native decoders if they know it: that for
CPUs, and that for GPUs on CPU tensors.
"""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest
import torch

from model_worker.engine.config import CacheConfig, EngineConfig, SchedulerConfig
from model_worker.engine.llm_engine import LLMEngine
from model_worker.engine.model_runner import ModelRunner
from model_worker.engine.models.decoder_spec import NATIVE_MODEL_TYPES
from model_worker.engine.ops.cpu.program import KernelLibrary
from model_worker.engine.sampling_params import SamplingParams
from tests.fakes.byte_tokenizer import ByteTokenizer
from tests.fakes.model_runners import make_runner
from tests.fakes.tiny_models import MAX_MODEL_LEN, TINY_MODELS, VOCAB_SIZE, build_tiny_model, make_tiny_plan
from tests.gpu.engines import generated, logprobs_of

NUM_NEW_TOKENS = 24
PROMPT_LENGTHS = (5, 17, 70, 33, 48)
NATIVE = [name for name, model in TINY_MODELS.items() if model.model_type in NATIVE_MODEL_TYPES]
ALL = [
    *((name, "transformers") for name in TINY_MODELS),
    *((name, "native") for name in NATIVE),
    *((name, "gpu") for name in NATIVE),
]
NUM_SHARED = 40  # tokens that the last two prompts have in common with the longest


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def _prompts() -> list[list[int]]:
    generator = random.Random(7)
    prompts = [[generator.randrange(VOCAB_SIZE) for _ in range(length)] for length in PROMPT_LENGTHS]
    for prompt in prompts[3:]:
        num_shared = min(NUM_SHARED, len(prompt) - 1)
        prompt[:num_shared] = prompts[2][:num_shared]
    return prompts


def _prompt_logprobs(runner: ModelRunner, prompt: list[int]) -> torch.Tensor:
    engine = LLMEngine(EngineConfig(), runner, ByteTokenizer(), stop_token_ids=(), max_model_len=MAX_MODEL_LEN)
    engine.add_request("0", prompt, SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0))
    (output,) = engine.step()
    assert output.prompt_logprobs is not None
    assert output.prompt_logprobs[0] is None
    return torch.tensor([entry.logprob for entry in output.prompt_logprobs[1:] if entry is not None])


def _run(
    runner: ModelRunner, prompts: list[list[int]], *, max_num_batched_tokens: int = 512, max_num_seqs: int = 8
) -> tuple[list[list[int]], LLMEngine]:
    config = EngineConfig(
        scheduler=SchedulerConfig(max_num_batched_tokens=max_num_batched_tokens, max_num_seqs=max_num_seqs)
    )
    engine = LLMEngine(config, runner, ByteTokenizer(), stop_token_ids=(), max_model_len=MAX_MODEL_LEN)
    sampling = SamplingParams(temperature=0.0, max_tokens=NUM_NEW_TOKENS)
    for i, prompt in enumerate(prompts):
        engine.add_request(str(i), prompt, sampling)
    tokens: list[list[int]] = [[] for _ in prompts]
    while engine.has_unfinished_requests:
        for output in engine.step():
            assert output.error is None, output.error
            for delta in output.deltas:
                tokens[int(output.request_id)] += delta.token_ids
    engine.check_integrity()
    return tokens, engine


def _runner(
    path: Path,
    impl: str,
    kernels: KernelLibrary,
    *,
    block_size: int,
    num_blocks: int,
    swap_space_gib: float | None = None,
    dtype: str = "float32",
) -> ModelRunner:
    config = EngineConfig(
        cache=CacheConfig(block_size=block_size, num_blocks=num_blocks, swap_space_gib=swap_space_gib),
        scheduler=SchedulerConfig(max_num_batched_tokens=512),
    )
    return make_runner(impl, make_tiny_plan(path, dtype=dtype), config, kernels)


@pytest.mark.parametrize(("name", "impl"), ALL)
def test_greedy_tokens_equal_those_of_generate(
    name: str, impl: str, best_kernels: KernelLibrary, tmp_path: Path
) -> None:
    model = build_tiny_model(name)
    model.save_pretrained(tmp_path)
    prompts = _prompts()
    expected = [generated(model, prompt, NUM_NEW_TOKENS) for prompt in prompts]
    runner = _runner(tmp_path, impl, best_kernels, block_size=16, num_blocks=64)

    alone, _ = _run(runner, prompts[2:3])
    assert alone == expected[2:3]

    torch.testing.assert_close(
        _prompt_logprobs(runner, prompts[2]), logprobs_of(model, prompts[2]), rtol=1e-4, atol=1e-4
    )

    together, _ = _run(runner, prompts)
    assert together == expected

    in_chunks, engine = _run(runner, prompts, max_num_batched_tokens=16, max_num_seqs=3)
    assert in_chunks == expected
    assert engine.stats().prefix_hit_tokens_total > 0  # the later prompts found the blocks of the longest

    num_blocks = 12 * len(runner.groups)  # just enough for the longest
    small = _runner(tmp_path, impl, best_kernels, block_size=8, num_blocks=num_blocks)
    scarce, engine = _run(small, prompts, max_num_batched_tokens=64)
    assert scarce == expected
    assert engine.stats().preemptions_total > 0 or any(group.limited for group in runner.groups)


@pytest.mark.parametrize(
    ("name", "impl"),
    [
        *itertools.product(
            ["llama", "mistral-window", "gemma2", "gemma3_text"],
            ["transformers", "native", "gpu"],
        ),
        ("llama4-chunked", "transformers"),
        ("deepseek_v3", "transformers"),
    ],
)
@pytest.mark.parametrize("swap_space_gib", [0.0, 0.001], ids=["recompute", "swap"])
def test_preempted_sequences_go_on_as_if_nothing_had_happened(
    name: str, impl: str, swap_space_gib: float, best_kernels: KernelLibrary, tmp_path: Path
) -> None:
    model = build_tiny_model(name)
    model.save_pretrained(tmp_path)
    prompts = [prompt[:9] for prompt in _prompts()] + [prompt[:4] for prompt in _prompts()]
    num_groups = len(_runner(tmp_path, impl, best_kernels, block_size=4, num_blocks=80).groups)
    runner = _runner(
        tmp_path, impl, best_kernels, block_size=4, num_blocks=14 * num_groups, swap_space_gib=swap_space_gib
    )
    found, engine = _run(runner, prompts, max_num_seqs=10)
    assert found == [generated(model, prompt, NUM_NEW_TOKENS) for prompt in prompts]
    stats = engine.stats()
    assert stats.preemptions_total > 0
    assert (stats.swapped_out_blocks_total > 0) == (swap_space_gib > 0)
    assert (stats.swapped_in_blocks_total > 0) == (swap_space_gib > 0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    ("name", "impl"),
    [
        *itertools.product(["llama", "mistral-window", "gemma2"], ["transformers", "native", "gpu"]),
        *((name, "transformers") for name in ["gpt2", "bloom", "falcon-alibi", "deepseek_v3", "gpt_oss"]),
    ],
)
def test_half_precision_stays_close(
    name: str, impl: str, dtype: str, best_kernels: KernelLibrary, tmp_path: Path
) -> None:
    """The median, because rounding may send a token to another expert."""
    model = build_tiny_model(name)
    model.save_pretrained(tmp_path)
    runner = _runner(tmp_path, impl, best_kernels, block_size=16, num_blocks=64, dtype=dtype)
    prompt = _prompts()[2]
    difference = _prompt_logprobs(runner, prompt) - logprobs_of(model, prompt)
    assert difference.abs().median() < (0.15 if dtype == "bfloat16" else 0.02)


def test_keys_and_values_of_float8_stay_close(best_kernels: KernelLibrary, tmp_path: Path) -> None:
    """Swapped out and in on the way."""
    model = build_tiny_model("llama")
    model.save_pretrained(tmp_path)
    cache = CacheConfig(block_size=4, num_blocks=20, kv_cache_dtype="float8_e4m3fn", swap_space_gib=0.001)
    config = EngineConfig(cache, SchedulerConfig(max_num_batched_tokens=512))
    runner = make_runner("gpu", make_tiny_plan(tmp_path), config, best_kernels)
    prompt = _prompts()[2]
    difference = _prompt_logprobs(runner, prompt) - logprobs_of(model, prompt)
    assert 0 < difference.abs().median() < 0.3
    prompts = [each[:9] for each in _prompts()]
    alone = [_run(runner, [each])[0][0] for each in prompts]
    together, engine = _run(runner, prompts)
    assert together == alone
    assert engine.stats().swapped_in_blocks_total > 0

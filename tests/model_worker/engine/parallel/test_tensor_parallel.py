"""Greedy tokens of a model that is divided among two processes equal those of the whole model, in float32."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from model_worker.engine.config import CacheConfig, EngineConfig, SchedulerConfig
from model_worker.engine.llm_engine import LLMEngine
from model_worker.engine.model_runner import ModelRunner
from model_worker.engine.models.decoder_spec import NATIVE_MODEL_TYPES
from model_worker.engine.models.gpu_decoder import GpuDecoder
from model_worker.engine.outputs import TokenLogprobs
from model_worker.engine.parallel.start import start_ranks
from model_worker.engine.sampling_params import SamplingParams
from registry.errors import UnsupportedModelError
from tests.fakes.byte_tokenizer import ByteTokenizer
from tests.fakes.divided_models import divided_runner
from tests.fakes.rank_launcher import fork_rank
from tests.fakes.tiny_models import MAX_MODEL_LEN, TINY_MODELS, VOCAB_SIZE, build_tiny_model, make_tiny_plan

NATIVE = [name for name, model in TINY_MODELS.items() if model.model_type in NATIVE_MODEL_TYPES]
BOTH = [*((name, "transformers") for name in TINY_MODELS), *((name, "native") for name in NATIVE)]
THOROUGH = [
    *((name, "transformers") for name in ("llama", "mixtral", "gpt_neox", "gemma2")),
    *((name, "native") for name in ("llama", "qwen3", "mixtral")),
]
NUM_SHARED = 40  # tokens that later prompts have in common with the longest


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def _prompts() -> list[list[int]]:
    generator = random.Random(7)
    prompts = [[generator.randrange(VOCAB_SIZE) for _ in range(length)] for length in (5, 17, 70, 33, 48)]
    for prompt in prompts[3:]:
        num_shared = min(NUM_SHARED, len(prompt) - 1)
        prompt[:num_shared] = prompts[2][:num_shared]
    return prompts


def _config(
    impl: str, *, size: int = 2, block_size: int = 16, num_blocks: int = 64, swap_space_gib: float | None = None
) -> EngineConfig:
    return EngineConfig(
        cache=CacheConfig(block_size=block_size, num_blocks=num_blocks, swap_space_gib=swap_space_gib),
        scheduler=SchedulerConfig(max_num_batched_tokens=512),
        model_impl=impl,
        tensor_parallel_size=size,
    )


def _run(
    runner: ModelRunner,
    prompts: list[list[int]],
    *,
    max_num_batched_tokens: int = 512,
    max_num_seqs: int = 8,
    max_tokens: int = 8,
    prompt_logprobs: int | None = None,
) -> tuple[list[list[int]], list[tuple[TokenLogprobs | None, ...]], LLMEngine]:
    config = EngineConfig(
        scheduler=SchedulerConfig(max_num_batched_tokens=max_num_batched_tokens, max_num_seqs=max_num_seqs)
    )
    engine = LLMEngine(config, runner, ByteTokenizer(), stop_token_ids=(), max_model_len=MAX_MODEL_LEN)
    sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens, prompt_logprobs=prompt_logprobs)
    for i, prompt in enumerate(prompts):
        engine.add_request(str(i), prompt, sampling)
    tokens: list[list[int]] = [[] for _ in prompts]
    logprobs: list[tuple[TokenLogprobs | None, ...]] = [() for _ in prompts]
    while engine.has_unfinished_requests:
        for output in engine.step():
            assert output.error is None, output.error
            logprobs[int(output.request_id)] += output.prompt_logprobs or ()
            for delta in output.deltas:
                tokens[int(output.request_id)] += delta.token_ids
    engine.check_integrity()
    return tokens, logprobs, engine


@pytest.mark.parametrize(("name", "impl"), BOTH)
def test_two_ranks_give_the_tokens_of_one(name: str, impl: str, tmp_path: Path) -> None:
    """Prompts in chunks, prefixes from the cache."""
    build_tiny_model(name).save_pretrained(tmp_path)
    expected, _, _ = _run(ModelRunner(make_tiny_plan(tmp_path), _config("transformers", size=1)), _prompts())
    with divided_runner(make_tiny_plan(tmp_path), _config(impl)) as runner:
        found, _, engine = _run(runner, _prompts(), max_num_batched_tokens=16, max_num_seqs=3)
    assert found == expected
    assert engine.stats().prefix_hit_tokens_total > 0


@pytest.mark.parametrize(("name", "impl"), THOROUGH)
@pytest.mark.parametrize("swap_space_gib", [0.0, 0.001], ids=["recompute", "swap"])
def test_preemption(name: str, impl: str, swap_space_gib: float, tmp_path: Path) -> None:
    build_tiny_model(name).save_pretrained(tmp_path)
    prompts = [prompt[:9] for prompt in _prompts()] + [prompt[:4] for prompt in _prompts()]
    whole = ModelRunner(make_tiny_plan(tmp_path), _config("transformers", size=1))
    expected, _, _ = _run(whole, prompts, max_tokens=16)
    config = _config(impl, block_size=4, num_blocks=11 * len(whole.groups), swap_space_gib=swap_space_gib)
    with divided_runner(make_tiny_plan(tmp_path), config) as runner:
        found, _, engine = _run(runner, prompts, max_num_seqs=10, max_tokens=16)
    assert found == expected
    stats = engine.stats()
    assert stats.preemptions_total > 0
    assert (stats.swapped_in_blocks_total > 0) == (swap_space_gib > 0)


@pytest.mark.parametrize(("name", "impl"), [("llama", "transformers"), ("llama", "native")])
def test_logprobs_of_prompts(name: str, impl: str, tmp_path: Path) -> None:
    build_tiny_model(name).save_pretrained(tmp_path)
    _, expected, _ = _run(
        ModelRunner(make_tiny_plan(tmp_path), _config("transformers", size=1)), _prompts(), prompt_logprobs=0
    )
    with divided_runner(make_tiny_plan(tmp_path), _config(impl)) as runner:
        _, found, _ = _run(runner, _prompts(), prompt_logprobs=0)
    for of_prompt, expected_of_prompt in zip(found, expected, strict=True):
        values = [entry.logprob for entry in of_prompt if entry is not None]
        assert values == pytest.approx([entry.logprob for entry in expected_of_prompt if entry is not None], abs=1e-4)


def test_norms_of_all_heads_count_repeated_kv_heads_once(tmp_path: Path) -> None:
    build_tiny_model("olmo2").save_pretrained(tmp_path)
    expected, _, _ = _run(ModelRunner(make_tiny_plan(tmp_path), _config("transformers", size=1)), _prompts())
    with divided_runner(make_tiny_plan(tmp_path), _config("native", size=4)) as runner:
        found, _, _ = _run(runner, _prompts())
    assert found == expected
    assert isinstance(runner.model, GpuDecoder)


@pytest.mark.parametrize("impl", ["transformers", "native"])
def test_four_ranks_repeat_kv_heads_and_keep_a_share(impl: str, tmp_path: Path) -> None:
    model = build_tiny_model("llama")
    model.save_pretrained(tmp_path)
    whole = ModelRunner(make_tiny_plan(tmp_path), _config("transformers", size=1))
    expected, _, _ = _run(whole, _prompts())
    with divided_runner(make_tiny_plan(tmp_path), _config(impl, size=4)) as runner:
        found, _, _ = _run(runner, _prompts())
    assert found == expected
    assert [attention.kv_shape.num_kv_heads for attention in runner.model.attentions] == [1, 1]
    assert [attention.kv_shape.num_kv_heads for attention in whole.model.attentions] == [2, 2]
    if isinstance(runner.model, GpuDecoder):  # the other's weights are packed
        num_own = sum(parameter.numel() for parameter in runner.model.parameters())
        assert num_own < 0.3 * sum(parameter.numel() for parameter in model.parameters())
    else:
        assert impl == "transformers"


@pytest.mark.parametrize("impl", ["transformers", "native"])
def test_sizes_that_do_not_divide_are_refused(impl: str, tmp_path: Path) -> None:
    build_tiny_model("llama").save_pretrained(tmp_path)  # 4 heads, 2 KV heads, 48 neurons
    with pytest.raises(UnsupportedModelError, match=r"size 3 is not possible .* 4 attention heads .* 1, 2 and 4"):
        start_ranks(make_tiny_plan(tmp_path), _config(impl, size=3), launch=fork_rank)

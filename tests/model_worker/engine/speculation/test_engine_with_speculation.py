"""Whatever the engine is given, it answers with speculation what it answers without."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st

from model_worker.engine.config import CacheConfig, EngineConfig, SchedulerConfig, SpeculationConfig
from model_worker.engine.executor import Executor
from model_worker.engine.llm import LLM
from model_worker.engine.llm_engine import LLMEngine
from model_worker.engine.model_runner import ModelRunner
from model_worker.engine.outputs import TokenLogprobs
from model_worker.engine.sampling_params import SamplingParams
from model_worker.engine.speculation import draft_lengths
from model_worker.engine.speculation.ngram_proposer import NgramProposer
from model_worker.engine.visibility import Visibility
from registry.errors import InternalError
from tests.fakes.byte_tokenizer import ByteTokenizer
from tests.fakes.fake_clock import FakeClock
from tests.fakes.fake_executor import EVERYTHING, FakeExecutor, next_token
from tests.fakes.tiny_models import VOCAB_SIZE, build_tiny_model, make_tiny_plan

Request = tuple[list[int], SamplingParams]
OFF = SpeculationConfig(speculation="off")
GROUPS = (EVERYTHING, (Visibility(sliding_window=5),), (Visibility(), Visibility(chunk_size=6)))


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def answers(
    executor: Executor,
    requests: SequenceOf[Request],
    speculation: SpeculationConfig,
    *,
    stop_token_ids: tuple[int, ...] = (),
    max_model_len: int = 64,
    enable_prefix_caching: bool = True,
    **scheduler: int,
) -> tuple[dict[tuple[str, int], list[Any]], LLMEngine]:
    """What each choice of each request got in all: tokens, text, logprobs and why it ended.

    The clock stands still, so that rows seem free and whatever can be guessed is.
    """
    config = EngineConfig(
        CacheConfig(enable_prefix_caching=enable_prefix_caching),
        SchedulerConfig(**{"max_num_seqs": 4, "max_num_batched_tokens": 16, **scheduler}),
        speculation,
    )
    engine = LLMEngine(
        config,
        executor,
        ByteTokenizer(),
        stop_token_ids=stop_token_ids,
        max_model_len=max_model_len,
        clock=FakeClock(),
    )
    for i, (prompt, sampling) in enumerate(requests):
        engine.add_request(str(i), prompt, sampling)
    found: dict[tuple[str, int], list[Any]] = {}
    for _ in range(2000):
        if not engine.has_unfinished_requests:
            break
        for output in engine.step():
            if output.error is not None:
                found[output.request_id, -1] = [output.error.message]
            for delta in output.deltas:
                choice = found.setdefault((output.request_id, delta.index), [[], "", [], None, None])
                choice[0] += delta.token_ids
                choice[1] += delta.text
                choice[2] += delta.logprobs or ()
                choice[3:] = delta.finish_reason, delta.stop_reason
        engine.check_integrity()
    assert not engine.has_unfinished_requests
    return found, engine


@st.composite
def fake_requests(draw: st.DrawFn) -> Request:
    prompt = draw(st.lists(st.integers(0, 2), min_size=1, max_size=14))
    max_tokens = draw(st.integers(1, 24))
    return prompt, SamplingParams(
        n=draw(st.integers(1, 3)),
        max_tokens=max_tokens,
        min_tokens=draw(st.integers(0, max_tokens)),
        stop_token_ids=draw(st.sampled_from([(), (), (2,)])),
        stop=draw(st.sampled_from([(), (), ("\x00\x01\x00\x01",), ("\x01\x01\x01", "\x00\x00")])),
        include_stop_str_in_output=draw(st.booleans()),
        priority=draw(st.integers(0, 1)),
        prompt_logprobs=draw(st.sampled_from([None, None, 0])),
    )


@settings(max_examples=250, deadline=None)
@given(
    requests=st.lists(fake_requests(), min_size=1, max_size=6),
    stop_token_ids=st.sampled_from([(), (2,)]),
    groups=st.sampled_from(GROUPS),
    num_spare_blocks=st.integers(0, 9),
    num_host_blocks=st.sampled_from([0, 20]),
    block_size=st.sampled_from([2, 3, 4]),
    enable_prefix_caching=st.booleans(),
    max_num_batched_tokens=st.integers(4, 24),
    num_speculative_tokens=st.integers(1, 9),
    ngram_min=st.integers(1, 3),
)
def test_answers_are_the_same(
    requests,
    stop_token_ids,
    groups,
    num_spare_blocks,
    num_host_blocks,
    block_size,
    num_speculative_tokens,
    ngram_min,
    **more,
):
    """Forks, preemption, swapping, windows, prefix cache, priorities, every way to end; three tokens, so that guesses
    are right now and then."""

    num_blocks = len(groups) * -(-38 // block_size) + num_spare_blocks  # for little more than one long sequence

    def answer(speculation: SpeculationConfig) -> dict[tuple[str, int], list[Any]]:
        executor = FakeExecutor(num_blocks, block_size, 3, num_host_blocks=num_host_blocks, groups=groups)
        found, _ = answers(executor, requests, speculation, stop_token_ids=stop_token_ids, max_model_len=38, **more)
        return found

    ngrams = SpeculationConfig(num_speculative_tokens=num_speculative_tokens, ngram_min=ngram_min, ngram_max=3)
    assert answer(ngrams) == answer(OFF)


class PeriodicExecutor(FakeExecutor):
    """Repeats the last `period` tokens for ever, so that every guess is right."""

    def __init__(self, period: int, **more: Any) -> None:
        super().__init__(**more)
        self.period = period

    def token_after(self, visible: list[list[int]], index: int) -> int:
        return visible[0][-self.period]


def test_right_guesses_save_steps_and_are_counted() -> None:
    prompt = [1, 2, 3, 4] * 2
    request = (prompt, SamplingParams(max_tokens=40))
    executor = PeriodicExecutor(4)
    found, engine = answers(executor, [request], SpeculationConfig(num_speculative_tokens=7))
    assert found["0", 0][0] == [1, 2, 3, 4] * 10
    stats = engine.stats()
    assert stats.generation_tokens_total == 40
    assert len(executor.steps) <= 15  # some of the first find out what a row costs
    assert stats.draft_tokens_total == stats.accepted_draft_tokens_total == 40 - len(executor.steps)


def test_only_what_was_accepted_enters_the_prefix_cache() -> None:
    """Two requests whose guesses differ from what comes; the third begins as the first one went on."""
    prompt = [0, 1, 0, 0, 1]
    tokens = list(prompt)
    for _ in range(20):
        tokens.append(next_token(tokens, 0, 2))
    executor = FakeExecutor(vocab_size=2)
    sampling = SamplingParams(max_tokens=8)
    config = EngineConfig(CacheConfig(), SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=64))
    engine = LLMEngine(config, executor, ByteTokenizer(), stop_token_ids=(), max_model_len=64, clock=FakeClock())
    for request_id, length in (("a", 5), ("b", 13), ("c", 15)):
        engine.add_request(request_id, tokens[:length], sampling)
        found: list[int] = []
        while engine.has_unfinished_requests:
            for output in engine.step():
                found += [token for delta in output.deltas for token in delta.token_ids]
            engine.check_integrity()
        assert found == tokens[length : length + 8]
    stats = engine.stats()
    assert stats.draft_tokens_total > stats.accepted_draft_tokens_total > 0
    # Of 5 + 8 tokens the last is not computed: b finds 12, in three blocks of four. c finds the same and no more than
    # the blocks before its own last token.
    assert stats.prefix_hit_tokens_total == 12 + 12


def test_guesses_never_cause_a_preemption() -> None:
    requests: list[Request] = [([1, 2, 3, 4] * 2, SamplingParams(max_tokens=12)) for _ in range(3)]
    most = 3 * 20 // 4  # blocks for all tokens of all of them, and none for guesses
    _, engine = answers(PeriodicExecutor(4, num_blocks=most), requests, SpeculationConfig())
    assert engine.stats().preemptions_total == 0


def test_steps_with_prompts_have_no_drafts_and_no_step_has_too_many_tokens() -> None:
    executor = PeriodicExecutor(2)
    requests: list[Request] = [([i, i + 1] * 9, SamplingParams(max_tokens=20)) for i in range(6)]
    answers(executor, requests, SpeculationConfig(), max_num_batched_tokens=10)
    assert any(item.drafts for step in executor.steps for item in step.scheduled)
    for step in executor.steps:
        assert step.num_tokens <= 10
        if step.num_drafts:
            assert all(item.num_tokens == 1 + len(item.drafts) for item in step.scheduled)


def test_a_step_has_logits_of_at_most_one_guess_for_each_sequence_that_could_run() -> None:
    executor = PeriodicExecutor(2, num_blocks=200)
    requests: list[Request] = [([i, i + 1] * 4, SamplingParams(max_tokens=20)) for i in range(4)]
    answers(executor, requests, SpeculationConfig(), max_num_seqs=5, max_num_batched_tokens=100)
    assert max(step.num_drafts for step in executor.steps) == 5


def test_an_error_after_a_wrong_guess_is_nobodys() -> None:
    """Rows after a wrong guess are computed from tokens that never were; what they give does not count."""
    request = ([0, 1, 0, 1, 0], SamplingParams(max_tokens=12))
    plain, _ = answers(FakeExecutor(vocab_size=2), [request], OFF)

    class Failing(FakeExecutor):
        def execute(self, output):  # type: ignore[no-untyped-def]
            result = super().execute(output)
            (item,) = output.scheduled
            samples = list(result.samples)
            for i, draft in enumerate(item.drafts):
                if samples[i].token_id != draft:
                    samples[i + 1 :] = [InternalError("not finite")] * (len(samples) - i - 1)
                    break
            return type(result)(tuple(samples), result.prompt_logprobs)

    found, engine = answers(Failing(vocab_size=2), [request], SpeculationConfig(num_speculative_tokens=5))
    assert found == plain
    assert engine.stats().draft_tokens_total > engine.stats().accepted_draft_tokens_total


def test_an_error_at_a_right_guess_ends_the_request() -> None:
    def fail(sequence: Any) -> InternalError | None:
        return InternalError("not finite") if sequence.num_tokens > 12 else None

    executor = PeriodicExecutor(2, fail_sample=fail)
    found, engine = answers(executor, [([0, 1, 0, 1], SamplingParams(max_tokens=20))], SpeculationConfig())
    assert found["0", -1] == ["not finite"]
    assert engine.stats().failed_total == 1


SAMPLERS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "greedy with logprobs": {"temperature": 0.0, "logprobs": 3, "prompt_logprobs": 1},
    "all tokens": {"temperature": 0.3, "seed": 1},
    "top-p": {"temperature": 0.5, "top_p": 0.8, "seed": 2, "logprobs": 0},
    "top-k, n": {"temperature": 0.5, "top_k": 3, "seed": 3, "n": 3},
    "min-p": {"temperature": 0.4, "min_p": 0.2, "seed": 4},
    "repetition": {"temperature": 0.0, "repetition_penalty": 1.05},
    "presence, frequency": {"temperature": 0.2, "presence_penalty": 0.02, "frequency_penalty": 0.02, "seed": 5},
    "bias, min_tokens": {"temperature": 0.2, "logit_bias": {5: 0.5}, "min_tokens": 20, "stop_token_ids": (3, 5)},
}


@pytest.fixture(scope="module", params=["llama", "mistral-window", "gpt_oss"])
def runner(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModelRunner:
    path = tmp_path_factory.mktemp(request.param)
    build_tiny_model(request.param).save_pretrained(path)
    config = EngineConfig(CacheConfig(num_blocks=80, block_size=8), SchedulerConfig(max_num_batched_tokens=64))
    return ModelRunner(make_tiny_plan(path), config)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_model_gives_the_same_tokens(sampler: str, runner: ModelRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draft_lengths, "_MIN_SPEEDUP", 0.0)  # guess also where the guesses are mostly wrong
    sampling = SamplingParams(**{"max_tokens": 40, "seed": 9, **SAMPLERS[sampler]})
    prompts = [[(7 * i) % VOCAB_SIZE for i in range(20)] * 2, [5, 3, 5, 3, 5], [1]]
    requests = [(prompt, sampling) for prompt in prompts]
    more = {"max_model_len": 128, "max_num_seqs": 9, "max_num_batched_tokens": 64}
    plain, _ = answers(runner, requests, OFF, **more)
    found, engine = answers(runner, requests, SpeculationConfig(ngram_min=1), **more)
    assert engine.stats().draft_tokens_total > 0
    for choice, (token_ids, text, logprobs, *ending) in plain.items():
        assert found[choice][0] == token_ids
        assert found[choice][1] == text
        assert found[choice][3:] == ending
        assert_close(found[choice][2], logprobs)


def test_a_guess_whose_keys_are_not_finite_costs_nothing(runner: ModelRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention multiplies them by zero where they are not seen, and zero times NaN is NaN."""
    poison = VOCAB_SIZE - 1
    requests: list[Request] = [([5, 3, 8], SamplingParams(temperature=0.0, max_tokens=12))]
    plain, _ = answers(runner, requests, OFF, max_model_len=128)
    monkeypatch.setattr(NgramProposer, "propose", lambda *_, **__: [poison, 4])
    embedding = runner.model.causal_lm.get_input_embeddings().weight  # type: ignore[attr-defined]
    with torch.inference_mode():
        kept = embedding[poison].clone()
        embedding[poison] = float("nan")
        found, engine = answers(runner, requests, SpeculationConfig(), max_model_len=128)
        embedding[poison] = kept
    assert poison not in plain["0", 0][0]
    assert found == plain
    assert engine.stats().draft_tokens_total == 2


def assert_close(found: list[TokenLogprobs], expected: list[TokenLogprobs]) -> None:
    """Rounding depends on the number of rows that are multiplied at once."""
    assert [entry.token_id for entry in found] == [entry.token_id for entry in expected]
    assert [entry.logprob for entry in found] == pytest.approx([entry.logprob for entry in expected], abs=1e-4)
    for a, b in zip(found, expected, strict=True):
        assert [top.token_id for top in a.top] == [top.token_id for top in b.top]


def small_model(path: Path, speculation: SpeculationConfig) -> LLM:
    return LLM(path, EngineConfig(speculation=speculation), dtype="float32", max_model_len=512)


def test_the_small_model_gives_the_same_tokens(smollm2_dir: Path) -> None:
    text = "Copy this list: apples, pears, plums, figs, dates, limes; apples, pears, plums, figs, dates, limes; apples,"
    prompts = [text, "Once upon a time", "1, 2, 3, 1, 2, 3, 1, 2,"]
    params = [
        SamplingParams(temperature=0.0, max_tokens=40),
        SamplingParams(temperature=0.8, top_p=0.9, seed=11, max_tokens=40),
        SamplingParams(temperature=0.3, seed=12, max_tokens=40, n=2, repetition_penalty=1.02),
    ]

    def run(llm: LLM) -> list[list[int]]:
        return [choice.token_ids for answer in llm.generate(prompts, params) for choice in answer.outputs]

    llm = small_model(smollm2_dir, SpeculationConfig())
    assert run(llm) == run(small_model(smollm2_dir, OFF))
    stats = llm.engine.stats()
    assert stats.draft_tokens_total >= stats.accepted_draft_tokens_total > 0
    llm.engine.check_integrity()

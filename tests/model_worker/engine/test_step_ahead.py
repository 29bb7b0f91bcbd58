"""An engine that runs ahead says what one says that does not, whatever happens."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence as SequenceOf
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from model_worker.engine.async_llm_engine import AsyncLLMEngine
from model_worker.engine.config import CacheConfig, EngineConfig, SchedulerConfig, SpeculationConfig
from model_worker.engine.llm_engine import LLMEngine
from model_worker.engine.outputs import FinishReason, RequestOutput
from model_worker.engine.sampling_params import SamplingParams
from model_worker.engine.step import SchedulerOutput
from model_worker.engine.visibility import Visibility
from registry.errors import InternalError, RootgraftError
from tests.fakes.ahead_executor import AheadExecutor
from tests.fakes.byte_tokenizer import ByteTokenizer
from tests.fakes.fake_clock import FakeClock
from tests.fakes.fake_executor import EVERYTHING, FakeExecutor, next_token

OFF = SpeculationConfig(speculation="off")


def make_engine(
    executor: FakeExecutor, *, speculation: SpeculationConfig = OFF, caching: bool = True, **scheduler: int
) -> LLMEngine:
    config = EngineConfig(
        CacheConfig(enable_prefix_caching=caching),
        SchedulerConfig(**{"max_num_seqs": 4, "max_num_batched_tokens": 16, **scheduler}),
        speculation,
    )
    return LLMEngine(config, executor, ByteTokenizer(), stop_token_ids=(), max_model_len=38, clock=FakeClock())


def run(engine: LLMEngine) -> list[RequestOutput]:
    news: list[RequestOutput] = []
    for _ in range(500):
        if not engine.has_unfinished_requests:
            break
        news += engine.step()
        engine.check_integrity()
    assert not engine.has_unfinished_requests
    return news


def tokens_of(news: list[RequestOutput], name: str = "r") -> list[int]:
    return [
        token for output in news if output.request_id == name for delta in output.deltas for token in delta.token_ids
    ]


def continuation(
    prompt: list[int], index: int, sampling: SamplingParams, vocab_size: int, groups: SequenceOf[Visibility]
) -> list[int]:
    tokens = list(prompt)
    while len(tokens) - len(prompt) < (sampling.max_tokens or 0):
        tokens.append(next_token(tokens, index, vocab_size, groups))
        if tokens[-1] in sampling.stop_token_ids:
            break
    return tokens[len(prompt) :]


def test_a_token_is_given_to_the_next_step_before_it_is_known() -> None:
    executor = AheadExecutor()
    engine = make_engine(executor)
    sampling = SamplingParams(max_tokens=5)
    engine.add_request("r", [1, 2, 3], sampling)
    counts = []
    news: list[RequestOutput] = []
    while engine.has_unfinished_requests:
        news += engine.step()
        counts.append((len(executor.steps), len(tokens_of(news))))
    assert counts == [(1, 0), (2, 1), (3, 2), (4, 3), (5, 4), (5, 5)]  # no row is computed past max_tokens
    assert executor.num_pending == 4
    assert tokens_of(news) == continuation([1, 2, 3], 0, sampling, 256, EVERYTHING)


def test_who_has_ended_is_dropped_from_the_step_that_is_under_way() -> None:
    executor = AheadExecutor()
    engine = make_engine(executor)
    first, second, *_ = continuation([1, 2, 3], 0, SamplingParams(max_tokens=9), 256, EVERYTHING)
    engine.add_request("r", [1, 2, 3], SamplingParams(max_tokens=9, stop_token_ids=(second,)))
    news = run(engine)
    assert tokens_of(news) == [first, second]
    assert [output.finished for output in news] == [False, True]
    assert len(executor.steps) == 3  # the third had been launched by then
    engine.rest()
    engine.add_request("s", [1, 2, 3], SamplingParams(max_tokens=2))
    assert tokens_of(run(engine), "s") == [first, second]


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(max_tokens=6, repetition_penalty=1.1),
        SamplingParams(max_tokens=6, presence_penalty=0.5),
        SamplingParams(max_tokens=6, frequency_penalty=-0.5),
    ],
)
def test_what_depends_on_the_output_waits_for_it(sampling: SamplingParams) -> None:
    executor = AheadExecutor()
    engine = make_engine(executor)
    engine.add_request("r", [1, 2, 3], sampling)
    assert tokens_of(run(engine)) == continuation([1, 2, 3], 0, sampling, 256, EVERYTHING)
    assert executor.num_pending == 0
    assert len(executor.steps) == 6


def test_other_processing_of_logits_runs_ahead() -> None:
    executor = AheadExecutor()
    engine = make_engine(executor)
    engine.add_request("r", [1, 2, 3], SamplingParams(max_tokens=6, min_tokens=4, logit_bias={3: 1.0}, stop=("x",)))
    run(engine)
    assert executor.num_pending == 5


def test_it_waits_for_tokens_while_guesses_pay_and_runs_ahead_while_they_do_not() -> None:
    """Text that repeats itself is guessed; the clock stands still, so that rows are free."""

    class Repeating(AheadExecutor):
        def token_after(self, visible: list[list[Any]], index: int) -> int:
            return int(visible[0][-4]) if len(visible[0]) < 25 else len(visible[0])

    executor = Repeating()
    engine = make_engine(executor, speculation=SpeculationConfig(num_speculative_tokens=3, ngram_min=3))
    engine.add_request("r", [7, 8, 9, 5] * 2, SamplingParams(max_tokens=30))
    assert tokens_of(run(engine)) == ([7, 8, 9, 5] * 5)[:17] + list(range(25, 38))
    drafts = [step.num_drafts for step in executor.steps]
    assert sum(drafts[:6]) >= 4
    assert not any(drafts[-8:])
    assert executor.num_pending >= 8


def test_who_lacks_a_block_goes_before_younger_ones_in_the_step_after_that() -> None:
    executor = AheadExecutor(num_blocks=9, block_size=3)
    engine = make_engine(executor, caching=False)
    sampling = SamplingParams(max_tokens=14)
    prompts = [[0] * 6, [1] * 5, [2] * 4]
    for i, prompt in enumerate(prompts):
        engine.add_request(f"r{i}", prompt, sampling)
    news = run(engine)
    for i, prompt in enumerate(prompts):
        assert tokens_of(news, f"r{i}") == continuation(prompt, 0, sampling, 256, EVERYTHING)
    oldest = [any(item.sequence.seq_id == 0 for item in step.scheduled) for step in executor.steps]
    alive = oldest[: len(oldest) - oldest[::-1].index(True)]
    assert False in alive
    assert all(one or other for one, other in pairwise(alive))
    assert engine.stats().preemptions_total > 0


def test_a_step_that_cannot_be_launched_fails_its_requests_after_the_one_before_it() -> None:
    def before_step(output: SchedulerOutput) -> None:
        if len(executor.steps) == 3:
            executor.steps.append(output)
            raise RuntimeError("no memory")

    executor = AheadExecutor(before_step=before_step)
    engine = make_engine(executor)
    engine.add_request("r", [1, 2, 3], SamplingParams(max_tokens=9))
    news = run(engine)
    assert len(tokens_of(news)) == 3
    assert isinstance(news[-1].error, InternalError)
    engine.add_request("s", [1, 2, 3], SamplingParams(max_tokens=9))
    assert len(tokens_of(run(engine), "s")) == 9


def test_what_was_launched_after_a_step_that_failed_fails_with_it() -> None:
    failing = {3}
    executor = AheadExecutor(
        fail_result=lambda output: RuntimeError("device") if len(executor.steps) in failing else None
    )
    engine = make_engine(executor)
    engine.add_request("r", [1, 2, 3], SamplingParams(max_tokens=9))
    news = [*engine.step(), *engine.step(), *engine.step()]  # the third one is launched
    engine.add_request("s", [1, 2, 3], SamplingParams(max_tokens=9))
    news += engine.step()
    assert {output.request_id for output in news if output.error} == {"r", "s"}
    engine.check_integrity()
    assert not engine.has_unfinished_requests
    engine.add_request("t", [1, 2, 3], SamplingParams(max_tokens=9))
    assert len(tokens_of(run(engine), "t")) == 9


def test_async_engine_runs_ahead() -> None:
    async def main() -> dict[str, list[int]]:
        engine = AsyncLLMEngine(make_engine(AheadExecutor(num_blocks=20)))
        await engine.start()

        async def ask(name: str, prompt: list[int]) -> tuple[str, list[int]]:
            tokens: list[int] = []
            async for output in engine.generate(name, prompt, SamplingParams(max_tokens=12)):
                tokens += [token for delta in output.deltas for token in delta.token_ids]
            return name, tokens

        async def leave() -> None:
            async for output in engine.generate("gone", [9], SamplingParams(max_tokens=30)):
                if output.deltas:
                    return

        found = await asyncio.gather(*(ask(f"r{i}", [i] * (1 + i)) for i in range(7)), leave())
        await engine.stop()
        assert engine.failed is None
        return dict(pair for pair in found if pair is not None)

    found = asyncio.run(main())
    for i in range(7):
        expected = continuation([i] * (1 + i), 0, SamplingParams(max_tokens=12), 256, EVERYTHING)
        assert found[f"r{i}"] == expected


Workload = tuple[list[int], int, int, int, int | None, bool, tuple[int, ...]]
REQUEST: st.SearchStrategy[Workload] = st.tuples(
    st.lists(st.integers(0, 1), min_size=1, max_size=14),  # prompt
    st.integers(1, 3),  # n
    st.integers(1, 20),  # max_tokens
    st.integers(0, 12),  # arrives at step
    st.one_of(st.none(), st.integers(0, 40)),  # is cancelled at step
    st.booleans(),  # depends on its output
    st.sampled_from([(), (), (2,), (0, 3)]),  # stop_token_ids
)


@settings(max_examples=400, deadline=None)
@given(
    requests=st.lists(REQUEST, min_size=1, max_size=8),
    failing_launches=st.sets(st.integers(0, 60), max_size=3),
    failing_results=st.sets(st.integers(0, 60), max_size=3),
    failing_samples=st.sets(st.integers(0, 100), max_size=3),
    num_spare_blocks=st.integers(0, 9),
    num_host_blocks=st.sampled_from([0, 20]),
    groups=st.sampled_from([EVERYTHING, (Visibility(sliding_window=5),), (Visibility(), Visibility(chunk_size=6))]),
    speculation=st.sampled_from([OFF, OFF, SpeculationConfig(num_speculative_tokens=5, ngram_min=1)]),
    caching=st.booleans(),
    budget=st.integers(4, 20),
    vocab_size=st.sampled_from([2, 5, 200]),
)
def test_any_mix_ends_with_the_tokens_of_steps_that_wait_and_nothing_held(
    requests: list[Workload],
    failing_launches: set[int],
    failing_results: set[int],
    failing_samples: set[int],
    num_spare_blocks: int,
    num_host_blocks: int,
    groups: tuple[Visibility, ...],
    speculation: SpeculationConfig,
    caching: bool,
    budget: int,
    vocab_size: int,
) -> None:
    num_launches = num_samples = 0

    def before_step(output: SchedulerOutput) -> None:
        nonlocal num_launches
        num_launches += 1
        if num_launches in failing_launches:
            raise RuntimeError("out of memory")

    def fail_sample(sequence: object) -> RootgraftError | None:
        nonlocal num_samples
        num_samples += 1
        return InternalError("not finite") if num_samples in failing_samples else None

    executor = AheadExecutor(
        num_blocks=len(groups) * 13 + num_spare_blocks,
        block_size=3,
        vocab_size=vocab_size,
        num_host_blocks=num_host_blocks,
        groups=groups,
        before_step=before_step,
        fail_sample=fail_sample,
        fail_result=lambda output: RuntimeError("device") if num_launches in failing_results else None,
    )
    engine = make_engine(executor, speculation=speculation, caching=caching, max_num_batched_tokens=budget)
    sampling = [
        SamplingParams(n=n, max_tokens=max_tokens, stop_token_ids=stops, presence_penalty=0.5 if depends else 0.0)
        for _, n, max_tokens, _, _, depends, stops in requests
        if all(stop < vocab_size for stop in stops)
    ]
    requests = [request for request in requests if all(stop < vocab_size for stop in request[6])]
    tokens: dict[tuple[str, int], list[int]] = {}
    reasons: dict[tuple[str, int], FinishReason | None] = {}
    ends: dict[str, RootgraftError | None] = {}
    cancelled: set[str] = set()
    for step in range(2_000):
        for number, (prompt, _, _, arrival, cancel, _, _) in enumerate(requests):
            if arrival == step:
                engine.add_request(str(number), [t % vocab_size for t in prompt], sampling[number])
            if cancel == step and engine.abort_request(str(number)):
                cancelled.add(str(number))
        for output in engine.step():
            assert output.request_id not in ends
            assert output.request_id not in cancelled
            if output.finished:
                ends[output.request_id] = output.error
            for delta in output.deltas:
                tokens.setdefault((output.request_id, delta.index), []).extend(delta.token_ids)
                reasons[output.request_id, delta.index] = delta.finish_reason
        engine.check_integrity()
        if step > 30 and not engine.has_unfinished_requests:
            break
    assert not engine.has_unfinished_requests
    assert {str(number) for number in range(len(requests))} == ends.keys() | cancelled
    if not (failing_launches or failing_results or failing_samples):
        assert not any(ends.values())
    for number, (prompt, n, *_) in enumerate(requests):
        if str(number) in ends and ends[str(number)] is None:
            for index in range(n):
                expected = continuation(prompt, index, sampling[number], vocab_size, groups)
                assert tokens[str(number), index] == expected
                assert reasons[str(number), index] is not None

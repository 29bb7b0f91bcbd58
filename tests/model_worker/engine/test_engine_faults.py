"""Steps that fail, logits that are not finite, cancelled requests: whoever is left gets the right tokens."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from model_worker.engine.config import CacheConfig, EngineConfig, SchedulerConfig, SpeculationConfig
from model_worker.engine.executor import Executor
from model_worker.engine.llm_engine import LLMEngine
from model_worker.engine.outputs import SampledToken
from model_worker.engine.sampling_params import SamplingParams
from model_worker.engine.step import ScheduledSequence, SchedulerOutput, StepResult
from model_worker.engine.visibility import Visibility
from registry.errors import InternalError, RootgraftError
from tests.fakes.byte_tokenizer import ByteTokenizer
from tests.fakes.fake_clock import FakeClock
from tests.fakes.fake_executor import EVERYTHING, FakeExecutor, next_token

Slot = tuple[int, int]
OFF = SpeculationConfig(speculation="off")
VOCAB_SIZE = 2  # so that guesses are right now and then


class PoisonedExecutor(FakeExecutor):
    """Every `period`-th wrong guess gives keys and values that are not finite.

    Attention reads whole blocks (see ops/paged_attention): a row is not finite where any slot of them is not, before or
    after its own. A block that a step begins is cleared, as ModelRunner does.
    """

    def __init__(self, period: int, **more: Any) -> None:
        super().__init__(**more)
        self.num_poisoned = 0
        self._period = period
        self._num_wrong = 0
        self._poisoned: set[Slot] = set()

    def execute(self, output: SchedulerOutput) -> StepResult:
        result = super().execute(output)
        samples = list(result.samples)
        for pairs in (output.swap_in, output.block_copies):
            # Of copies nothing is remembered here: no test needs it.
            for _, block in pairs:
                self._clear(block)
        first = 0
        for item in output.scheduled:
            self._write(item, samples[first : first + 1 + len(item.drafts)])
            first += len(item.sampled) + len(item.drafts)
        first = 0
        for item in output.scheduled:
            num_rows = len(item.sampled) + len(item.drafts)
            if self._reads_poison(item):
                samples[first : first + num_rows] = [InternalError("not finite")] * num_rows
            first += num_rows
        return StepResult(tuple(samples), result.prompt_logprobs)

    def _write(self, item: ScheduledSequence, samples: SequenceOf[SampledToken | RootgraftError]) -> None:
        end = item.start + item.num_tokens
        last_begun = end // self.block_size * self.block_size
        for table in item.sequence.block_tables:
            for position in range(item.start, end):
                self._poisoned.discard((table[position // self.block_size], position % self.block_size))
            if item.start <= last_begun < end:
                self._clear(table[last_begun // self.block_size])
        for place, draft in enumerate(item.drafts):
            sample = samples[place]
            if isinstance(sample, SampledToken) and sample.token_id == draft:
                continue
            self._num_wrong += 1
            if self._num_wrong % self._period == 0:
                self.num_poisoned += 1
                position = end - len(item.drafts) + place
                for table in item.sequence.block_tables:
                    self._poisoned.add((table[position // self.block_size], position % self.block_size))
            return

    def _clear(self, block: int) -> None:
        self._poisoned -= {(block, offset) for offset in range(self.block_size)}

    def _reads_poison(self, item: ScheduledSequence) -> bool:
        last = (item.start + item.num_tokens - 1) // self.block_size
        for group, table in zip(self.groups, item.sequence.block_tables, strict=True):
            blocks = set(table[group.first_visible(item.start) // self.block_size : last + 1])
            if any(block in blocks for block, _ in self._poisoned):
                return True
        return False


def make_engine(executor: Executor, speculation: SpeculationConfig, **scheduler: int) -> LLMEngine:
    """The clock stands still, so that rows seem free and whatever can be guessed is."""
    config = EngineConfig(
        CacheConfig(), SchedulerConfig(**{"max_num_seqs": 4, "max_num_batched_tokens": 16, **scheduler}), speculation
    )
    return LLMEngine(config, executor, ByteTokenizer(), stop_token_ids=(), max_model_len=38, clock=FakeClock())


def continuation(prompt: list[int], index: int, count: int, groups: SequenceOf[Visibility]) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens, index, VOCAB_SIZE, groups))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("period", [1, 3])
def test_a_wrong_guess_that_spoils_what_stands_beside_it_costs_nobody_the_request(period: int) -> None:
    executor = PoisonedExecutor(period, vocab_size=VOCAB_SIZE)
    engine = make_engine(executor, SpeculationConfig(num_speculative_tokens=5))
    prompt = [0, 1, 0, 1, 0]
    engine.add_request("r", prompt, SamplingParams(max_tokens=30))
    found: list[int] = []
    while engine.has_unfinished_requests:
        for output in engine.step():
            assert output.error is None
            found += [token_id for delta in output.deltas for token_id in delta.token_ids]
        engine.check_integrity()
    assert found == continuation(prompt, 0, 30, EVERYTHING)
    assert executor.num_poisoned == 1  # nothing is guessed for it any more


def test_right_guesses_before_an_error_are_handed_out() -> None:
    """As without guesses: the request gets the tokens before it fails."""

    class Failing(FakeExecutor):
        def token_after(self, visible: list[list[int]], index: int) -> int:
            return visible[0][-2]

        def execute(self, output: SchedulerOutput) -> StepResult:
            result = super().execute(output)
            (item,) = output.scheduled
            first_row = item.start + item.num_tokens - len(item.drafts)
            samples = [
                InternalError("not finite") if first_row + place > 12 else sample
                for place, sample in enumerate(result.samples)
            ]
            return StepResult(tuple(samples), {})

    def run(speculation: SpeculationConfig) -> tuple[list[int], list[str]]:
        engine = make_engine(Failing(vocab_size=VOCAB_SIZE), speculation)
        engine.add_request("r", [0, 1, 0, 1], SamplingParams(max_tokens=20))
        tokens: list[int] = []
        errors: list[str] = []
        while engine.has_unfinished_requests:
            for output in engine.step():
                tokens += [token_id for delta in output.deltas for token_id in delta.token_ids]
                errors += [output.error.message] if output.error else []
            engine.check_integrity()
        return tokens, errors

    assert run(SpeculationConfig()) == run(OFF) == ([0, 1, 0, 1, 0, 1, 0, 1, 0], ["not finite"])


def test_an_error_after_the_end_is_nobodys() -> None:
    """The request ends at a guess that was right; that the next row is not finite does not matter any more."""

    class Failing(FakeExecutor):
        def token_after(self, visible: list[list[int]], index: int) -> int:
            return visible[0][-4]

        def execute(self, output: SchedulerOutput) -> StepResult:
            result = super().execute(output)
            (item,) = output.scheduled
            past = [list(item.drafts[:place]).count(3) for place in range(len(result.samples))]
            return StepResult(
                tuple(InternalError("x") if n else s for n, s in zip(past, result.samples, strict=True)), {}
            )

    engine = make_engine(Failing(vocab_size=4), SpeculationConfig())
    engine.add_request("r", [0, 1, 2, 3, 0, 1, 2, 3], SamplingParams(max_tokens=20, stop_token_ids=(3,)))
    outputs = []
    while engine.has_unfinished_requests:
        outputs += engine.step()
        engine.check_integrity()
    assert outputs[-1].error is None
    assert [t for o in outputs for d in o.deltas for t in d.token_ids] == [0, 1, 2, 3]


Fault = tuple[list[int], int, int, int, int | None]
REQUEST: st.SearchStrategy[Fault] = st.tuples(
    st.lists(st.integers(0, 1), min_size=1, max_size=14),  # prompt
    st.integers(1, 3),  # n
    st.integers(1, 20),  # max_tokens
    st.integers(0, 10),  # arrives at step
    st.one_of(st.none(), st.integers(0, 30)),  # is cancelled at step
)


@settings(max_examples=200, deadline=None)
@given(
    requests=st.lists(REQUEST, min_size=1, max_size=8),
    failing_steps=st.sets(st.integers(0, 60), max_size=6),
    period=st.integers(1, 20),
    num_spare_blocks=st.integers(0, 9),
    num_host_blocks=st.sampled_from([0, 20]),
    groups=st.sampled_from([EVERYTHING, (Visibility(sliding_window=5),), (Visibility(), Visibility(chunk_size=6))]),
    speculation=st.sampled_from([OFF, SpeculationConfig(num_speculative_tokens=5, ngram_min=1)]),
    budget=st.integers(4, 20),
)
def test_whatever_fails_the_others_get_the_right_tokens_and_nothing_is_held(
    requests: list[Fault],
    failing_steps: set[int],
    period: int,
    num_spare_blocks: int,
    num_host_blocks: int,
    groups: tuple[Visibility, ...],
    speculation: SpeculationConfig,
    budget: int,
) -> None:
    num_steps = 0
    lost: set[str] = set()

    def fail(output: SchedulerOutput) -> None:
        nonlocal num_steps
        num_steps += 1
        if num_steps in failing_steps:
            lost.update(item.sequence.group.request_id for item in output.scheduled if item.sequence.group)
            raise RuntimeError("out of memory")

    executor = PoisonedExecutor(
        period,
        num_blocks=len(groups) * 13 + num_spare_blocks,
        block_size=3,
        vocab_size=VOCAB_SIZE,
        num_host_blocks=num_host_blocks,
        groups=groups,
        before_step=fail,
    )
    engine = make_engine(executor, speculation, max_num_batched_tokens=budget)
    tokens: dict[tuple[str, int], list[int]] = {}
    ends: dict[str, RootgraftError | None] = {}
    cancelled: set[str] = set()
    for step in range(2_000):
        for number, (prompt, n, max_tokens, arrival, cancel) in enumerate(requests):
            if arrival == step:
                engine.add_request(str(number), prompt, SamplingParams(n=n, max_tokens=max_tokens))
            if cancel == step and engine.abort_request(str(number)):
                cancelled.add(str(number))
        for output in engine.step():
            assert output.request_id not in ends
            assert output.request_id not in cancelled
            if output.finished:
                ends[output.request_id] = output.error
            for delta in output.deltas:
                tokens.setdefault((output.request_id, delta.index), []).extend(delta.token_ids)
        engine.check_integrity()
        if step > 30 and not engine.has_unfinished_requests:
            break
    assert not engine.has_unfinished_requests
    assert {name for name, error in ends.items() if error} == lost
    assert {str(number) for number in range(len(requests))} == ends.keys() | cancelled
    for number, (prompt, n, max_tokens, _, _) in enumerate(requests):
        if str(number) in ends.keys() - lost:
            for index in range(n):
                assert tokens[str(number), index] == continuation(prompt, index, max_tokens, groups)

from __future__ import annotations

import pytest
from hypothesis import given, settings, strategies as st

from model_worker.engine.block_manager import BlockManager
from model_worker.engine.config import SchedulerConfig
from model_worker.engine.outputs import FinishReason, SampledToken
from model_worker.engine.sampling_params import SamplingParams
from model_worker.engine.scheduler import Scheduler
from model_worker.engine.sequence import Sequence, SequenceGroup, SequenceStatus
from model_worker.engine.step import SchedulerOutput
from model_worker.engine.visibility import Visibility
from registry.errors import InvalidRequestError, RateLimitError
from tests.fakes.fake_clock import FakeClock
from tests.fakes.fake_executor import EVERYTHING, FakeExecutor, next_token

VOCAB = 256


class Harness:
    """A scheduler and a fake executor, with the part of the engine between them."""

    def __init__(
        self,
        *,
        num_blocks: int = 64,
        block_size: int = 4,
        caching: bool = True,
        num_host_blocks: int = 0,
        groups: tuple[Visibility, ...] = EVERYTHING,
        **config: int,
    ) -> None:
        settings_ = {"max_num_seqs": 8, "max_num_batched_tokens": 16, "max_num_waiting": 100, **config}
        self.groups = groups
        self.manager = BlockManager(
            num_blocks,
            block_size,
            enable_prefix_caching=caching,
            num_host_blocks=num_host_blocks,
            groups=groups,
            max_step_tokens=settings_["max_num_batched_tokens"],
        )
        self.clock = FakeClock()
        self.scheduler = Scheduler(SchedulerConfig(**settings_), self.manager, clock=self.clock)
        self.executor = FakeExecutor(num_blocks, block_size, VOCAB, num_host_blocks=num_host_blocks, groups=groups)
        self.next_id = 0

    def add(
        self, prompt: list[int], *, n: int = 1, max_tokens: int = 5, name: str | None = None, priority: int = 0
    ) -> SequenceGroup:
        sampling = SamplingParams(n=n, max_tokens=max_tokens, priority=priority)
        sequences = [Sequence(self.next_id + i, i, prompt, sampling, seed=i) for i in range(n)]
        group = SequenceGroup(name or f"r{self.next_id}", sequences, sampling, 0.0)
        self.next_id += n
        self.scheduler.add(group)
        return group

    def step(self) -> SchedulerOutput:
        output = self.scheduler.schedule()
        if output.scheduled:
            samples = iter(self.executor.execute(output).samples)
            self.scheduler.observe(output, seconds=0.01 * output.num_tokens, swap_s=self.swap_s(output))
            self.scheduler.complete(output)
            for item in output.scheduled:
                for sequence in item.sampled:
                    sample = next(samples)
                    assert isinstance(sample, SampledToken)
                    sequence.append(sample.token_id)
                    if sequence.num_output_tokens == sequence.sampling.max_tokens:
                        self.scheduler.finish(sequence, FinishReason.LENGTH)
        self.scheduler.check_integrity()
        return output

    def swap_s(self, output: SchedulerOutput) -> float:
        return 1e-6 * (len(output.swap_out) + len(output.swap_in))

    def run(self, limit: int = 10_000) -> None:
        for _ in range(limit):
            if not self.scheduler.has_unfinished:
                return
            self.step()
        raise AssertionError("the scheduler does not come to an end")


def expected_output(
    prompt: list[int], index: int, max_tokens: int, groups: tuple[Visibility, ...] = EVERYTHING
) -> list[int]:
    tokens = list(prompt)
    for _ in range(max_tokens):
        tokens.append(next_token(tokens, index, VOCAB, groups))
    return tokens[len(prompt) :]


def test_a_long_prompt_is_computed_in_chunks_while_others_decode() -> None:
    harness = Harness()
    short = harness.add([1, 2], max_tokens=20)
    harness.step()
    harness.add(list(range(60)), max_tokens=1)
    outputs = [harness.step() for _ in range(4)]
    assert [output.num_tokens for output in outputs] == [16, 16, 16, 16]
    assert all(output.scheduled[0].sequence is short.sequences[0] for output in outputs)
    assert [bool(output.scheduled[1].sampled) for output in outputs] == [False, False, False, True]


def chunks_of(output: SchedulerOutput) -> dict[str, int]:
    """Request id to the tokens that a step computes of it."""
    assert all(item.sequence.group is not None for item in output.scheduled)
    return {item.sequence.group.request_id: item.num_tokens for item in output.scheduled if item.sequence.group}


def test_beside_streams_prompts_get_a_bounded_share_and_alone_the_whole_step() -> None:
    harness = Harness(max_num_batched_tokens=40, max_mixed_prefill_tokens=8)
    harness.add(list(range(100)), max_tokens=1, name="alone")
    assert chunks_of(harness.step()) == {"alone": 40}
    harness.run()
    streams = [harness.add([i], max_tokens=30, name=f"s{i}") for i in range(3)]
    harness.step()
    harness.add(list(range(100, 160)), max_tokens=1, name="long")
    for _ in range(7):
        assert chunks_of(harness.step()) == {"s0": 1, "s1": 1, "s2": 1, "long": 8}
    assert all(stream.sequences[0].num_output_tokens == 8 for stream in streams)


def test_a_crowd_of_prompts_gets_a_larger_share_than_one_beside_the_same_streams() -> None:
    harness = Harness(max_num_batched_tokens=64, max_mixed_prefill_tokens=8, num_blocks=200)
    for i in range(2):
        harness.add([i], max_tokens=30)
    harness.step()
    for i in range(5):
        harness.add([i] * 40, max_tokens=1)
    assert harness.step().num_tokens == 2 + 8 * 5 // 2
    for i in range(20):  # those that find no place in the batch do not count: 5 of 8 are taken by now
        harness.add([i] * 40, max_tokens=1)
    assert harness.step().num_tokens == 2 + 8 * 6 // 2


def test_short_prompts_pass_a_long_one_that_keeps_half_of_the_share() -> None:
    harness = Harness(max_num_batched_tokens=16, num_blocks=100)
    harness.add(list(range(100)), max_tokens=1, name="long")
    harness.step()
    harness.add(list(range(100, 170)), max_tokens=1, name="second")
    for i in range(3):
        harness.add([i] * 6, max_tokens=1, name=f"short{i}")
    assert chunks_of(harness.step()) == {"long": 8, "short0": 6, "short1": 2}
    assert chunks_of(harness.step()) == {"long": 8, "short1": 4, "short2": 4}
    # What no shorter one takes goes to that with the fewest tokens left: the second has 70, the long one 60 of 100.
    assert chunks_of(harness.step()) == {"long": 14, "short2": 2}


def test_prompts_of_equal_length_are_computed_one_after_the_other() -> None:
    harness = Harness(max_num_batched_tokens=16)
    for name in ("a", "b"):
        harness.add([ord(name)] * 40, max_tokens=1, name=name)
    assert [chunks_of(harness.step()) for _ in range(5)] == [
        {"a": 16},
        {"a": 16},
        {"a": 8, "b": 8},
        {"b": 16},
        {"b": 16},
    ]


def test_nobody_passes_the_first_that_waits_where_room_for_it_would_be_lost() -> None:
    harness = Harness(num_blocks=14, max_num_batched_tokens=8, caching=False)
    harness.add(list(range(20)), max_tokens=1, name="running")  # 5 blocks
    harness.step()
    harness.add(list(range(20, 44)), max_tokens=1, name="first")  # 6 blocks
    harness.add([1] * 5, max_tokens=1, name="short")  # 2 blocks
    order = []
    while harness.scheduler.has_unfinished:
        order += [name for name in chunks_of(harness.step()) if name not in order]
    assert order == ["running", "first", "short"]


def test_a_better_priority_is_served_first_and_equal_ones_in_order() -> None:
    harness = Harness(max_num_seqs=1)
    for number, priority in enumerate((5, 5, 0, -1, 5)):
        harness.add([number] * 4, max_tokens=2, priority=priority, name=f"{priority}/{number}")
    order: list[str] = []
    while harness.scheduler.has_unfinished:
        order += [name for name in chunks_of(harness.step()) if name not in order]
    assert order == ["-1/3", "0/2", "5/0", "5/1", "5/4"]


def test_the_victim_is_the_youngest_of_the_worst_priority() -> None:
    harness = Harness(num_blocks=10, caching=False)
    bulk = [harness.add([i] * 6, max_tokens=20, priority=1) for i in range(2)]
    harness.step()
    urgent = [harness.add([9 + i] * 6, max_tokens=20, priority=0) for i in range(2)]
    while harness.scheduler.num_preemptions == 0:
        harness.step()
    assert bulk[1].sequences[0].preempted
    assert not bulk[0].sequences[0].preempted
    harness.run()
    assert not any(group.sequences[0].preempted for group in urgent)
    for i, group in enumerate(urgent):
        assert group.sequences[0].output_token_ids == expected_output([9 + i] * 6, 0, 20)


def test_first_come_first_served() -> None:
    harness = Harness(max_num_seqs=2)
    groups = [harness.add([i, i + 1], max_tokens=3) for i in range(6)]
    order: list[str] = []
    while harness.scheduler.has_unfinished:
        harness.step()
        order += [g.request_id for g in groups if g.finished and g.request_id not in order]
    assert order == [g.request_id for g in groups]


def test_the_youngest_is_preempted_and_everybody_finishes_with_the_right_tokens() -> None:
    harness = Harness(num_blocks=10, caching=False)
    groups = [harness.add([i] * 6, max_tokens=20) for i in range(4)]
    harness.run()
    assert harness.scheduler.num_preemptions > 0
    for i, group in enumerate(groups):
        assert group.sequences[0].output_token_ids == expected_output([i] * 6, 0, 20)
    assert harness.manager.num_used_blocks == 0


def test_swapped_sequences_go_on_where_they_were() -> None:
    harness = Harness(num_blocks=10, num_host_blocks=20, caching=False)
    groups = [harness.add([i] * 6, max_tokens=20) for i in range(4)]
    most_host_blocks = 0
    while harness.scheduler.has_unfinished:
        output = harness.step()
        most_host_blocks = max(most_host_blocks, harness.manager.num_used_host_blocks)
        assert not (output.swap_out and output.swap_in)
    scheduler = harness.scheduler
    assert scheduler.num_preemptions == scheduler.num_preemptions_by_swap > 0
    assert scheduler.num_swapped_out_blocks == scheduler.num_swapped_in_blocks > 0
    assert most_host_blocks > 0
    computed = sum(item.num_tokens for output in harness.executor.steps for item in output.scheduled)
    assert computed == 4 * (6 + 20 - 1)  # nothing twice
    for i, group in enumerate(groups):
        assert group.sequences[0].output_token_ids == expected_output([i] * 6, 0, 20)


def test_a_full_host_pool_leaves_recomputation() -> None:
    harness = Harness(num_blocks=10, num_host_blocks=2, caching=False)
    for i in range(4):
        harness.add([i] * 6, max_tokens=20)
    harness.run()
    assert harness.scheduler.num_preemptions > harness.scheduler.num_preemptions_by_swap


def test_whichever_is_cheaper_is_chosen() -> None:
    harness = Harness(num_blocks=10, num_host_blocks=20, caching=False)
    harness.scheduler.preemption_cost.blocks_swapped(1, seconds=1e3)
    for i in range(4):
        harness.add([i] * 6, max_tokens=20)
    harness.run()
    assert harness.scheduler.num_preemptions > 0
    assert harness.scheduler.num_preemptions_by_swap == 0


def test_a_swapped_request_can_be_cancelled() -> None:
    harness = Harness(num_blocks=10, num_host_blocks=20, caching=False)
    groups = [harness.add([i] * 6, n=2, max_tokens=20) for i in range(2)]
    while not harness.manager.num_used_host_blocks:
        harness.step()
    for group in groups:
        harness.scheduler.abort(group.request_id)
        harness.scheduler.check_integrity()
    assert harness.manager.num_used_host_blocks == harness.manager.num_used_blocks == 0


def test_windowed_layers_let_a_sequence_hold_a_bounded_number_of_blocks() -> None:
    """Prompts of any length too: their blocks are taken and given back as they advance."""
    windowed = (Visibility(sliding_window=8),)
    harness = Harness(num_blocks=8, groups=windowed, max_num_batched_tokens=16)
    assert harness.manager.num_blocks_for(10_000) == 8
    assert harness.manager.longest_sequence(10_000) == 10_000
    group = harness.add([3] * 80, max_tokens=60)
    used = []
    while harness.scheduler.has_unfinished:
        harness.step()
        used.append(harness.manager.num_used_blocks)
    assert max(used[6:]) <= 3  # of 4 tokens: 8 are seen, and the block under way
    assert group.sequences[0].output_token_ids == expected_output([3] * 80, 0, 60, windowed)


def test_prompts_that_wait_for_each_others_blocks_go_on() -> None:
    windowed = (Visibility(sliding_window=8),)
    harness = Harness(num_blocks=13, groups=windowed, max_num_batched_tokens=16, caching=False)
    groups = [harness.add([i] * (60 + i), max_tokens=10) for i in range(4)]
    harness.run()
    for i, group in enumerate(groups):
        assert group.sequences[0].output_token_ids == expected_output([i] * (60 + i), 0, 10, windowed)


def test_choices_share_the_prompt_and_differ_after_it() -> None:
    harness = Harness()
    group = harness.add(list(range(10)), n=3, max_tokens=6)
    first = harness.step()
    assert [item.num_tokens for item in first.scheduled] == [10]
    assert first.scheduled[0].sampled == tuple(group.sequences)
    harness.run()
    for index, sequence in enumerate(group.sequences):
        assert sequence.output_token_ids == expected_output(list(range(10)), index, 6)


def test_a_request_for_several_choices_waits_until_there_is_room_for_all() -> None:
    harness = Harness(max_num_seqs=4)
    harness.add([1], n=3, max_tokens=4)
    harness.add([2], n=2, max_tokens=4)
    for _ in range(3):
        harness.step()
        assert len(harness.scheduler.running) <= 4
    harness.run()


def test_a_shared_prefix_is_computed_once() -> None:
    harness = Harness()
    harness.add(list(range(13)), max_tokens=1)
    harness.run()
    harness.add(list(range(13)), max_tokens=1)
    output = harness.step()
    assert output.scheduled[0].start == 12
    assert (harness.scheduler.num_prefix_queried_tokens, harness.scheduler.num_prefix_hit_tokens) == (26, 12)


def test_a_prompt_preempted_half_way_is_counted_once() -> None:
    harness = Harness(num_blocks=14, max_num_seqs=4, max_num_batched_tokens=5)
    for i in range(2):
        harness.add([200 + i] * 3, max_tokens=24)
    harness.step()
    long = harness.add(list(range(32)), max_tokens=1)
    while harness.scheduler.num_preemptions == 0:
        harness.step()
    assert long.sequences[0].num_output_tokens == 0
    harness.run()
    assert harness.scheduler.num_prefix_queried_tokens == 3 + 3 + 32
    assert long.sequences[0].num_cached_tokens == 0


def test_abort_releases_waiting_and_running() -> None:
    harness = Harness(max_num_seqs=1)
    running, waiting = harness.add([1] * 9, max_tokens=9), harness.add([2], max_tokens=9)
    harness.step()
    assert running.sequences[0].status is SequenceStatus.RUNNING
    assert harness.scheduler.abort(running.request_id) is running
    assert harness.scheduler.abort(waiting.request_id) is waiting
    assert harness.scheduler.abort(waiting.request_id) is None
    harness.scheduler.check_integrity()
    assert harness.manager.num_used_blocks == 0
    assert not harness.scheduler.has_unfinished
    assert harness.step().scheduled == ()


def test_a_full_queue_refuses_with_a_retry_time() -> None:
    harness = Harness(max_num_waiting=2)
    harness.add([1])
    harness.add([1])
    with pytest.raises(RateLimitError) as caught:
        harness.add([1])
    assert caught.value.retry_after_s == 1.0  # nothing is known yet


def test_the_retry_time_is_that_of_the_queue() -> None:
    harness = Harness(max_num_waiting=2, max_num_seqs=1)
    harness.add([1], max_tokens=1)
    for _ in range(4):  # one starts every 5 seconds
        harness.add([1], max_tokens=1)
        harness.clock.advance(5.0)
        harness.step()
    harness.add([1])
    retry_times = []
    for _ in range(2):
        with pytest.raises(RateLimitError) as caught:
            harness.add([1])
        retry_times.append(caught.value.retry_after_s)
    assert retry_times == [5.0, 10.0]


def test_more_choices_than_sequences_are_refused() -> None:
    with pytest.raises(InvalidRequestError, match="at most 2"):
        Harness(max_num_seqs=2).add([1], n=3)


def test_a_share_of_no_tokens_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="max-mixed-prefill-tokens"):
        Harness(max_mixed_prefill_tokens=0)


@pytest.mark.parametrize(("seqs", "tokens"), [(0, 16), (17, 16)])
def test_a_budget_below_one_token_a_sequence_is_refused(seqs: int, tokens: int) -> None:
    with pytest.raises(InvalidRequestError, match="max-num-batched-tokens"):
        Harness(max_num_seqs=seqs, max_num_batched_tokens=tokens)


REQUEST = st.tuples(
    st.integers(1, 24),  # prompt length
    st.integers(1, 2),  # distinct token values: few, so that prefixes meet
    st.integers(1, 3),  # n
    st.integers(1, 16),  # max_tokens
    st.integers(0, 12),  # arrives at step
    st.one_of(st.none(), st.integers(0, 30)),  # is cancelled at step
    st.integers(0, 2),  # priority
)


LAYERS = st.sampled_from(
    [
        EVERYTHING,
        (Visibility(sliding_window=7),),
        (Visibility(chunk_size=6),),
        (Visibility(), Visibility(sliding_window=5)),
        (Visibility(sliding_window=9), Visibility(), Visibility(sliding_window=9)),
    ]
)


@settings(max_examples=200, deadline=None)
@given(
    requests=st.lists(REQUEST, min_size=1, max_size=12),
    num_blocks=st.integers(10, 30),
    budget=st.integers(4, 20),
    mixed=st.integers(1, 20),
    caching=st.booleans(),
    num_host_blocks=st.integers(0, 30),
    layers=LAYERS,
)
def test_any_mix_ends_with_the_right_tokens_and_nothing_held(
    requests: list[tuple[int, int, int, int, int, int | None, int]],
    num_blocks: int,
    budget: int,
    mixed: int,
    caching: bool,
    num_host_blocks: int,
    layers: tuple[Visibility, ...],
) -> None:
    """No leak, no double use, no starvation, whatever arrives, is cancelled or is preempted."""
    harness = Harness(
        num_blocks=num_blocks * len(layers),
        caching=caching,
        num_host_blocks=num_host_blocks,
        groups=layers,
        max_num_seqs=4,
        max_num_batched_tokens=budget,
        max_mixed_prefill_tokens=mixed,
    )
    groups: dict[int, SequenceGroup] = {}
    prompts: dict[int, list[int]] = {}
    cancelled: set[int] = set()
    for step in range(31):
        for number, (length, values, n, max_tokens, arrival, _, priority) in enumerate(requests):
            if arrival == step:
                prompts[number] = [i % values for i in range(length)]
                groups[number] = harness.add(prompts[number], n=n, max_tokens=max_tokens, priority=priority)
        for number, request in enumerate(requests):
            if request[5] == step and number in groups and not groups[number].finished:
                harness.scheduler.abort(groups[number].request_id)
                cancelled.add(number)
        harness.step()
    harness.run(limit=2_000)
    for number, group in groups.items():
        if number not in cancelled:
            for sequence in group.sequences:
                assert sequence.output_token_ids == expected_output(
                    prompts[number], sequence.index, requests[number][3], layers
                )
    assert harness.manager.num_used_blocks == 0
    assert not harness.scheduler.running
    assert not harness.scheduler.waiting


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=8),
    hot_length=st.integers(1, 30),
    hot_priority=st.integers(0, 3),
    mixed=st.integers(1, 12),
    num_blocks=st.integers(12, 40),
)
def test_neither_prompts_nor_streams_starve_under_endless_arrivals(
    lengths: list[int], hot_length: int, hot_priority: int, mixed: int, num_blocks: int
) -> None:
    """Requests of the best class present end although others of the same class or worse ones never stop coming."""
    harness = Harness(
        num_blocks=num_blocks, max_num_seqs=4, max_num_batched_tokens=12, max_mixed_prefill_tokens=mixed, caching=False
    )
    watched = [harness.add([number] * length, max_tokens=10) for number, length in enumerate(lengths)]
    for _ in range(1_500):
        if len(harness.scheduler.waiting) < 20:
            harness.add([99] * hot_length, max_tokens=3, priority=hot_priority)
        decoding = [s for s in harness.scheduler.running if s.num_tokens - s.num_computed_tokens == 1]
        before = harness.scheduler.num_preemptions
        scheduled = {item.sequence for item in harness.step().scheduled}
        if harness.scheduler.num_preemptions == before:
            assert scheduled >= set(decoding)
        if all(group.finished for group in watched):
            return
    raise AssertionError("somebody starves")


def test_a_hot_stream_of_arrivals_starves_nobody() -> None:
    harness = Harness(num_blocks=12, max_num_seqs=3)
    victim = harness.add(list(range(20)), max_tokens=20)
    for i in range(200):
        harness.add([i % 5], max_tokens=2)
        harness.step()
        if victim.finished:
            break
    assert victim.finished


def test_a_queue_for_nobody_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="max-num-waiting"):
        Harness(max_num_waiting=0)


def test_the_pace_of_the_queue_is_measured_from_when_a_preempted_request_began_it() -> None:
    harness = Harness(num_blocks=10, caching=False, max_num_waiting=3)
    harness.add([9], max_tokens=1)
    harness.run()
    harness.clock.advance(500.0)
    for i in range(3):
        harness.add([i] * 6, max_tokens=20)
    harness.step()
    harness.clock.advance(500.0)
    while not harness.scheduler.waiting:
        harness.step()
    harness.clock.advance(3.0)
    for i in range(2):
        harness.add([i])
    with pytest.raises(RateLimitError) as caught:
        harness.add([1])
    assert caught.value.retry_after_s == 3.0

"""Whatever arrives, is cancelled or is preempted."""

from __future__ import annotations

from hypothesis import given, settings, strategies as st

from model_worker.engine.sequence import SequenceGroup
from model_worker.engine.visibility import Visibility
from tests.fakes.fake_executor import EVERYTHING
from tests.fakes.scheduler_harness import SchedulerHarness, expected_output

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
    harness = SchedulerHarness(
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
    harness = SchedulerHarness(
        num_blocks=num_blocks, max_num_seqs=4, max_num_batched_tokens=12, max_mixed_prefill_tokens=mixed, caching=False
    )
    watched = [harness.add([number] * length, max_tokens=10) for number, length in enumerate(lengths)]
    for _ in range(1_500):
        if len(harness.scheduler.waiting) < 20:
            harness.add([99] * hot_length, max_tokens=3, priority=hot_priority)
        decoding = [s for s in harness.scheduler.running if s.num_tokens - s.num_computed_tokens == 1]
        before = harness.scheduler.preemption.num_preemptions
        scheduled = {item.sequence for item in harness.step().scheduled}
        if harness.scheduler.preemption.num_preemptions == before:
            assert scheduled >= set(decoding)
        if all(group.finished for group in watched):
            return
    raise AssertionError("somebody starves")

"""Who loses its blocks when they run out, and how it comes back."""

from __future__ import annotations

from model_worker.engine.visibility import Visibility
from tests.fakes.scheduler_harness import SchedulerHarness, expected_output


def test_the_victim_is_the_youngest_of_the_worst_priority() -> None:
    harness = SchedulerHarness(num_blocks=10, caching=False)
    bulk = [harness.add([i] * 6, max_tokens=20, priority=1) for i in range(2)]
    harness.step()
    urgent = [harness.add([9 + i] * 6, max_tokens=20, priority=0) for i in range(2)]
    while harness.scheduler.preemption.num_preemptions == 0:
        harness.step()
    assert bulk[1].sequences[0].preempted
    assert not bulk[0].sequences[0].preempted
    harness.run()
    assert not any(group.sequences[0].preempted for group in urgent)
    for i, group in enumerate(urgent):
        assert group.sequences[0].output_token_ids == expected_output([9 + i] * 6, 0, 20)


def test_the_youngest_is_preempted_and_everybody_finishes_with_the_right_tokens() -> None:
    harness = SchedulerHarness(num_blocks=10, caching=False)
    groups = [harness.add([i] * 6, max_tokens=20) for i in range(4)]
    harness.run()
    assert harness.scheduler.preemption.num_preemptions > 0
    for i, group in enumerate(groups):
        assert group.sequences[0].output_token_ids == expected_output([i] * 6, 0, 20)
    assert harness.manager.num_used_blocks == 0


def test_swapped_sequences_go_on_where_they_were() -> None:
    harness = SchedulerHarness(num_blocks=10, num_host_blocks=20, caching=False)
    groups = [harness.add([i] * 6, max_tokens=20) for i in range(4)]
    most_host_blocks = 0
    while harness.scheduler.has_unfinished:
        output = harness.step()
        most_host_blocks = max(most_host_blocks, harness.manager.num_used_host_blocks)
        assert not (output.swap_out and output.swap_in)
    scheduler = harness.scheduler
    assert scheduler.preemption.num_preemptions == scheduler.preemption.num_by_swap > 0
    assert scheduler.preemption.num_swapped_out_blocks == scheduler.preemption.num_swapped_in_blocks > 0
    assert most_host_blocks > 0
    computed = sum(item.num_tokens for output in harness.executor.steps for item in output.scheduled)
    assert computed == 4 * (6 + 20 - 1)  # nothing twice
    for i, group in enumerate(groups):
        assert group.sequences[0].output_token_ids == expected_output([i] * 6, 0, 20)


def test_a_full_host_pool_leaves_recomputation() -> None:
    harness = SchedulerHarness(num_blocks=10, num_host_blocks=2, caching=False)
    for i in range(4):
        harness.add([i] * 6, max_tokens=20)
    harness.run()
    assert harness.scheduler.preemption.num_preemptions > harness.scheduler.preemption.num_by_swap


def test_whichever_is_cheaper_is_chosen() -> None:
    harness = SchedulerHarness(num_blocks=10, num_host_blocks=20, caching=False)
    harness.scheduler.preemption.cost.blocks_swapped(1, seconds=1e3)
    for i in range(4):
        harness.add([i] * 6, max_tokens=20)
    harness.run()
    assert harness.scheduler.preemption.num_preemptions > 0
    assert harness.scheduler.preemption.num_by_swap == 0


def test_a_swapped_request_can_be_cancelled() -> None:
    harness = SchedulerHarness(num_blocks=10, num_host_blocks=20, caching=False)
    groups = [harness.add([i] * 6, n=2, max_tokens=20) for i in range(2)]
    while not harness.manager.num_used_host_blocks:
        harness.step()
    for group in groups:
        harness.scheduler.abort(group.request_id)
        harness.scheduler.check_integrity()
    assert harness.manager.num_used_host_blocks == harness.manager.num_used_blocks == 0


def test_prompts_that_wait_for_each_others_blocks_go_on() -> None:
    windowed = (Visibility(sliding_window=8),)
    harness = SchedulerHarness(num_blocks=13, groups=windowed, max_num_batched_tokens=16, caching=False)
    groups = [harness.add([i] * (60 + i), max_tokens=10) for i in range(4)]
    harness.run()
    for i, group in enumerate(groups):
        assert group.sequences[0].output_token_ids == expected_output([i] * (60 + i), 0, 10, windowed)


def test_a_prompt_preempted_half_way_is_counted_once() -> None:
    harness = SchedulerHarness(num_blocks=14, max_num_seqs=4, max_num_batched_tokens=5)
    for i in range(2):
        harness.add([200 + i] * 3, max_tokens=24)
    harness.step()
    long = harness.add(list(range(32)), max_tokens=1)
    while harness.scheduler.preemption.num_preemptions == 0:
        harness.step()
    assert long.sequences[0].num_output_tokens == 0
    harness.run()
    assert harness.scheduler.num_prefix_queried_tokens == 3 + 3 + 32
    assert long.sequences[0].num_cached_tokens == 0

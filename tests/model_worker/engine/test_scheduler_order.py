"""Who runs before whom."""

from __future__ import annotations

from tests.fakes.scheduler_harness import SchedulerHarness, chunks_of


def test_nobody_passes_the_first_that_waits_where_room_for_it_would_be_lost() -> None:
    harness = SchedulerHarness(num_blocks=14, max_num_batched_tokens=8, caching=False)
    harness.add(list(range(20)), max_tokens=1, name="running")  # 5 blocks
    harness.step()
    harness.add(list(range(20, 44)), max_tokens=1, name="first")  # 6 blocks
    harness.add([1] * 5, max_tokens=1, name="short")  # 2 blocks
    order = []
    while harness.scheduler.has_unfinished:
        order += [name for name in chunks_of(harness.step()) if name not in order]
    assert order == ["running", "first", "short"]


def test_a_better_priority_is_served_first_and_equal_ones_in_order() -> None:
    harness = SchedulerHarness(max_num_seqs=1)
    for number, priority in enumerate((5, 5, 0, -1, 5)):
        harness.add([number] * 4, max_tokens=2, priority=priority, name=f"{priority}/{number}")
    order: list[str] = []
    while harness.scheduler.has_unfinished:
        order += [name for name in chunks_of(harness.step()) if name not in order]
    assert order == ["-1/3", "0/2", "5/0", "5/1", "5/4"]


def test_first_come_first_served() -> None:
    harness = SchedulerHarness(max_num_seqs=2)
    groups = [harness.add([i, i + 1], max_tokens=3) for i in range(6)]
    order: list[str] = []
    while harness.scheduler.has_unfinished:
        harness.step()
        order += [g.request_id for g in groups if g.finished and g.request_id not in order]
    assert order == [g.request_id for g in groups]


def test_a_hot_stream_of_arrivals_starves_nobody() -> None:
    harness = SchedulerHarness(num_blocks=12, max_num_seqs=3)
    victim = harness.add(list(range(20)), max_tokens=20)
    for i in range(200):
        harness.add([i % 5], max_tokens=2)
        harness.step()
        if victim.finished:
            break
    assert victim.finished

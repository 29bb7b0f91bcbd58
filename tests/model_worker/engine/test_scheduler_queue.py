"""A queue that is full, and what it says."""

from __future__ import annotations

import pytest

from registry.errors import InvalidRequestError, RateLimitError
from tests.fakes.scheduler_harness import SchedulerHarness


def test_a_full_queue_refuses_with_a_retry_time() -> None:
    harness = SchedulerHarness(max_num_waiting=2)
    harness.add([1])
    harness.add([1])
    with pytest.raises(RateLimitError) as caught:
        harness.add([1])
    assert caught.value.retry_after_s == 1.0  # nothing is known yet


def test_the_retry_time_is_that_of_the_queue() -> None:
    harness = SchedulerHarness(max_num_waiting=2, max_num_seqs=1)
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


def test_the_pace_of_the_queue_is_measured_from_when_a_preempted_request_began_it() -> None:
    harness = SchedulerHarness(num_blocks=10, caching=False, max_num_waiting=3)
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


def test_a_queue_for_nobody_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="max-num-waiting"):
        SchedulerHarness(max_num_waiting=0)

"""Requests for several choices."""

from __future__ import annotations

import pytest

from registry.errors import InvalidRequestError
from tests.fakes.scheduler_harness import SchedulerHarness, expected_output


def test_choices_share_the_prompt_and_differ_after_it() -> None:
    harness = SchedulerHarness()
    group = harness.add(list(range(10)), n=3, max_tokens=6)
    first = harness.step()
    assert [item.num_tokens for item in first.scheduled] == [10]
    assert first.scheduled[0].sampled == tuple(group.sequences)
    harness.run()
    for index, sequence in enumerate(group.sequences):
        assert sequence.output_token_ids == expected_output(list(range(10)), index, 6)


def test_a_request_for_several_choices_waits_until_there_is_room_for_all() -> None:
    harness = SchedulerHarness(max_num_seqs=4)
    harness.add([1], n=3, max_tokens=4)
    harness.add([2], n=2, max_tokens=4)
    for _ in range(3):
        harness.step()
        assert len(harness.scheduler.running) <= 4
    harness.run()


def test_more_choices_than_sequences_are_refused() -> None:
    with pytest.raises(InvalidRequestError, match="at most 2"):
        SchedulerHarness(max_num_seqs=2).add([1], n=3)

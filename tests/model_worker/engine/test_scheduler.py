from __future__ import annotations

import pytest

from model_worker.engine.sequence import SequenceStatus
from registry.errors import InvalidRequestError
from tests.fakes.scheduler_harness import SchedulerHarness


def test_abort_releases_waiting_and_running() -> None:
    harness = SchedulerHarness(max_num_seqs=1)
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


def test_a_share_of_no_tokens_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="max-mixed-prefill-tokens"):
        SchedulerHarness(max_mixed_prefill_tokens=0)


@pytest.mark.parametrize(("seqs", "tokens"), [(0, 16), (17, 16)])
def test_a_budget_below_one_token_a_sequence_is_refused(seqs: int, tokens: int) -> None:
    with pytest.raises(InvalidRequestError, match="max-num-batched-tokens"):
        SchedulerHarness(max_num_seqs=seqs, max_num_batched_tokens=tokens)

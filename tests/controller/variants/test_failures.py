from __future__ import annotations

import pytest

from controller.protocol import WorkerStats
from controller.variants.failures import FIRST_PAUSE_S, MAX_PAUSE_AFTER_READING_S, MAX_PAUSE_S, Failures
from controller.workers import Worker
from registry.errors import CheckpointError, RootgraftError, UpstreamError
from tests.fakes.fake_clock import FakeClock

ERROR = UpstreamError("broken")


def worker(worker_id: str = "w") -> Worker:
    return Worker(worker_id, f"http://{worker_id}", (), WorkerStats(), 0.0)


@pytest.mark.parametrize(
    ("error", "longest_s", "num_tries"),
    [(ERROR, MAX_PAUSE_S, 12), (CheckpointError("of a damaged file"), MAX_PAUSE_AFTER_READING_S, 20)],
)
def test_the_pauses_grow_up_to_a_bound_and_begin_anew_after_a_success(
    error: RootgraftError, longest_s: float, num_tries: int
) -> None:
    clock = FakeClock()
    failures, one = Failures(clock), worker()
    pauses: list[float] = []
    for _ in range(num_tries):
        assert failures.is_due(one, "sql")
        failures.note(one, "sql", error)
        failure = failures.of(one, "sql")
        assert failure is not None
        pauses.append(failures.retry_in_s(failure))
        assert not failures.is_due(one, "sql")
        clock.advance(pauses[-1])
    assert pauses[:3] == [FIRST_PAUSE_S, 2 * FIRST_PAUSE_S, 4 * FIRST_PAUSE_S]
    assert pauses[-1] == longest_s
    failures.forget(one, "sql")
    assert failures.of(one, "sql") is None
    failures.note(one, "sql", ERROR)
    clock.advance(FIRST_PAUSE_S)
    assert failures.is_due(one, "sql")


def test_workers_and_variants_fail_apart() -> None:
    failures, one, other = Failures(FakeClock()), worker("a"), worker("b")
    failures.note(one, "sql", ERROR)
    assert failures.is_due(one, "chat")
    assert failures.is_due(other, "sql")
    failures.note(other, "sql", ERROR)
    failures.keep_only(one, {"chat"})
    assert failures.of(one, "sql") is None
    assert failures.of(other, "sql") is not None
    failures.forget_all("sql")
    assert failures.of(other, "sql") is None


def test_a_worker_that_is_gone_is_forgotten() -> None:
    failures, one = Failures(FakeClock()), worker()
    failures.note(one, "sql", ERROR)
    del one
    assert len(failures._of_worker) == 0

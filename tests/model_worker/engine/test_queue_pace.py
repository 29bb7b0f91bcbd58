from __future__ import annotations

from model_worker.engine.queue_pace import QueuePace
from tests.fakes.fake_clock import FakeClock


def test_without_a_measurement_it_is_a_second() -> None:
    assert QueuePace(FakeClock()).refuse() == 1.0


def test_each_refused_request_is_told_a_later_time_until_one_starts() -> None:
    clock = FakeClock()
    pace = QueuePace(clock)
    pace.queue_begins()
    for _ in range(3):
        clock.advance(4.0)
        pace.one_starts()
    assert [pace.refuse(), pace.refuse(), pace.refuse()] == [4.0, 8.0, 12.0]
    clock.advance(4.0)
    pace.one_starts()
    assert pace.refuse() == 12.0


def test_a_queue_that_stands_still_is_measured_by_how_long_it_does() -> None:
    clock = FakeClock()
    pace = QueuePace(clock)
    pace.queue_begins()
    clock.advance(30.0)
    assert pace.refuse() == 30.0
    clock.advance(10_000.0)
    assert pace.refuse() == 600.0


def test_quiet_times_are_not_counted() -> None:
    clock = FakeClock()
    pace = QueuePace(clock)
    pace.queue_begins()
    pace.one_starts()
    clock.advance(3600.0)
    pace.queue_begins()
    clock.advance(2.0)
    pace.one_starts()
    assert pace.refuse() == 2.0

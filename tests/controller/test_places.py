from __future__ import annotations

from controller.places import Places


def full(num: int) -> Places:
    places = Places(num)
    for _ in range(num):
        assert not places.all_taken
        places.take()
    assert places.all_taken
    return places


def test_each_refused_request_is_told_a_later_time_until_a_place_is_free() -> None:
    places = full(4)  # one becomes free every 3 seconds
    assert [places.refuse(12.0), places.refuse(12.0), places.refuse(12.0)] == [3.0, 6.0, 9.0]
    places.leave()
    places.take()
    assert places.refuse(12.0) == 9.0


def test_what_was_not_measured_is_not_told() -> None:
    assert full(1).refuse(None) is None


def test_a_time_has_bounds() -> None:
    assert full(1000).refuse(1.0) == 1.0
    assert full(1).refuse(10_000.0) == 600.0

from __future__ import annotations

import math

from hypothesis import given, strategies as st

from model_worker.engine.lora.residency import RequestRate, Resident, choose_victims, value_of_keeping


def test_a_rate_counts_recent_requests_and_fades() -> None:
    rate = RequestRate(memory_s=100.0)
    for second in range(2_000):
        rate.observe(second / 2)
    assert math.isclose(rate.at(999.5), 2.0, rel_tol=0.01)
    assert math.isclose(rate.at(1_099.5), 2.0 / math.e, rel_tol=0.01)


def test_what_is_asked_for_often_dear_to_reload_and_small_is_worth_most() -> None:
    base = {"rate": 1.0, "num_waiting": 0, "reload_s": 1.0, "num_bytes": 100}
    value = value_of_keeping(**base)
    assert value_of_keeping(**{**base, "rate": 2.0}) == 2 * value
    assert value_of_keeping(**{**base, "reload_s": 2.0}) == 2 * value
    assert value_of_keeping(**{**base, "num_bytes": 50}) == 2 * value
    assert value_of_keeping(**{**base, "num_waiting": 1}) == 2 * value
    assert value_of_keeping(**{**base, "reload_s": 0.0, "num_bytes": 0}) > 0


def test_the_least_valued_go_and_ties_are_settled_by_order() -> None:
    residents = [Resident("a", 1.0, 2, 10), Resident("b", 1.0, 1, 10), Resident("c", 0.5, 3, 10)]
    assert choose_victims(residents, num_places=1, num_bytes=0) == ["c"]
    assert choose_victims(residents, num_places=2, num_bytes=0) == ["c", "b"]
    assert choose_victims(residents, num_places=0, num_bytes=11) == ["c", "b"]
    assert choose_victims(residents, num_places=0, num_bytes=0) == []
    assert choose_victims(residents, num_places=4, num_bytes=0) is None
    assert choose_victims(residents, num_places=0, num_bytes=31) is None


def test_a_small_one_stays_where_a_larger_one_has_to_go_anyway() -> None:
    residents = [Resident("small", 1.0, 1, 1), Resident("large", 2.0, 2, 100)]
    assert choose_victims(residents, num_places=0, num_bytes=50) == ["large"]
    assert choose_victims(residents, num_places=2, num_bytes=50) == ["small", "large"]


@given(
    sizes=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 20)), max_size=8),
    num_places=st.integers(-1, 9),
    num_bytes=st.integers(-5, 100),
)
def test_enough_goes_and_nobody_in_vain(sizes: list[tuple[int, int]], num_places: int, num_bytes: int) -> None:
    residents = [Resident(i, float(value), i, size) for i, (value, size) in enumerate(sizes)]
    victims = choose_victims(residents, num_places=num_places, num_bytes=num_bytes)
    if victims is None:
        assert len(sizes) < num_places or sum(size for _, size in sizes) < num_bytes
        return

    def enough(chosen: list[int]) -> bool:
        return len(chosen) >= num_places and sum(sizes[i][1] for i in chosen) >= num_bytes

    assert enough(victims)
    assert not any(enough([other for other in victims if other != one]) for one in victims)

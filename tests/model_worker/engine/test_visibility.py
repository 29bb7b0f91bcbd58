from __future__ import annotations

from hypothesis import given, strategies as st

from model_worker.engine.visibility import Visibility

LIMIT = st.none() | st.integers(1, 30)


@given(LIMIT, LIMIT, st.integers(0, 100))
def test_the_first_visible_position_is_as_defined(window: int | None, chunk: int | None, position: int) -> None:
    seen = [
        j
        for j in range(position + 1)
        if (window is None or position - j < window) and (chunk is None or j // chunk == position // chunk)
    ]
    assert Visibility(window, chunk).first_visible(position) == seen[0]


@given(LIMIT, LIMIT, st.integers(1, 60))
def test_limits_that_no_position_reaches_change_nothing(
    window: int | None, chunk: int | None, max_model_len: int
) -> None:
    visibility = Visibility(window, chunk)
    within = visibility.within(max_model_len)
    for position in range(max_model_len):
        assert within.first_visible(position) == visibility.first_visible(position)
    assert within.limited == any(visibility.first_visible(position) for position in range(max_model_len))

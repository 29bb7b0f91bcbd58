import pytest

from model_worker.engine.speculation.acceptance_rate import AcceptanceRate


def test_begins_with_what_is_expected_and_ends_with_what_was_seen():
    acceptance = AcceptanceRate(window=32)
    assert acceptance.rate(0.7) == 0.7
    for _ in range(200):
        acceptance.observe(3, then_wrong=True)
    assert acceptance.rate(0.0) == pytest.approx(0.75 * 32 / 36, abs=0.03)
    assert acceptance.rate(1.0) == pytest.approx((0.75 * 32 + 4) / 36, abs=0.03)


def test_a_change_is_noticed_within_the_window():
    acceptance = AcceptanceRate(window=32)
    for _ in range(50):
        acceptance.observe(8, then_wrong=False)
    assert acceptance.rate(0.5) > 0.9
    for _ in range(32):
        acceptance.observe(0, then_wrong=True)
    assert acceptance.rate(0.5) < 0.45


def test_guesses_that_were_not_checked_count_for_nothing():
    acceptance = AcceptanceRate(window=32)
    acceptance.observe(0, then_wrong=False)
    assert acceptance.rate(0.3) == 0.3

import random

import pytest

from model_worker.engine.speculation.step_time import StepTime


def fitted(rows: list[int], fixed_s: float, row_s: float, *, noise: float = 0.0) -> StepTime:
    generator = random.Random(3)
    step_time = StepTime()
    for num_rows in rows:
        step_time.observe(num_rows, (fixed_s + row_s * num_rows) * (1.0 + noise * generator.random()))
    return step_time


def test_finds_what_a_step_and_a_row_cost():
    step_time = fitted([1, 5, 1, 9, 2, 1, 1, 4] * 20, 0.006, 0.0004)
    assert step_time.row_s == pytest.approx(0.0004)
    assert step_time.seconds(1) == pytest.approx(0.0064)
    assert step_time.seconds(12) == pytest.approx(0.0108)


def test_forgets_what_was_long_ago():
    step_time = fitted([1, 5] * 200, 0.020, 0.002)
    for num_rows in [1, 5] * 1000:
        step_time.observe(num_rows, 0.006 + 0.0004 * num_rows)
    assert step_time.row_s == pytest.approx(0.0004, rel=0.05)
    assert step_time.seconds(1) == pytest.approx(0.0064, rel=0.05)


def test_a_stall_moves_it_by_little():
    step_time = fitted([1, 5] * 100, 0.006, 0.0004)
    step_time.observe(5, 2.0)
    assert step_time.seconds(5) < 0.0085


def test_a_row_never_costs_less_than_nothing_nor_more_than_its_share():
    cheaper = fitted([1, 5] * 10, 0.010, -0.001)
    assert cheaper.row_s == 0.0
    dearer = fitted([10, 20] * 10, -0.05, 0.01)
    assert dearer.seconds(1) > 0.0
    assert dearer.row_s * 10 <= dearer.seconds(10) * (1 + 1e-9)


def test_equal_steps_tell_nothing_of_rows():
    step_time = fitted([8] * 100, 0.006, 0.0004)
    assert not step_time.tells_apart(4)
    assert step_time.row_s == 0.0
    for _ in range(5):
        step_time.observe(12, 0.006 + 0.0004 * 12)
    assert step_time.tells_apart(4)
    for _ in range(2000):
        step_time.observe(8, 0.006 + 0.0004 * 8)
    assert not step_time.tells_apart(4)


def test_knows_nothing_before_the_first_step():
    assert not StepTime().tells_apart(1)
    assert StepTime().seconds(1) == 0.0

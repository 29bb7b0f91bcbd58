from __future__ import annotations

import pytest

from model_worker.engine.block_manager import PreemptionSize
from model_worker.engine.preemption_cost import PreemptionCost

SIZE = PreemptionSize(num_tokens=100, num_blocks=10)


def test_what_was_never_measured_is_tried() -> None:
    cost = PreemptionCost()
    assert cost.prefers_swap(SIZE)
    cost.prompts_computed(10, seconds=1e-9)
    assert cost.prefers_swap(SIZE)


@pytest.mark.parametrize(("token_s", "block_s", "swap"), [(1.0, 9.0, True), (1.0, 11.0, False)])
def test_the_cheaper_way_back_is_chosen(token_s: float, block_s: float, swap: bool) -> None:
    cost = PreemptionCost()
    cost.prompts_computed(4, seconds=4 * token_s)
    cost.blocks_swapped(3, seconds=3 * block_s)
    assert cost.prefers_swap(SIZE) is swap


def test_rates_follow_what_is_measured_without_jumping() -> None:
    cost = PreemptionCost()
    for _ in range(50):
        cost.blocks_swapped(1, seconds=1.0)
    cost.blocks_swapped(1, seconds=2.0)
    assert cost.block_s == pytest.approx(1.2)
    for _ in range(50):
        cost.blocks_swapped(1, seconds=2.0)
    assert cost.block_s == pytest.approx(2.0, rel=1e-3)

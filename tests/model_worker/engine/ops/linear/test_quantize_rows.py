"""Quantizing rows to 8 bits in groups of 32, on every machine level."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from model_worker.engine.ops.cpu.program import Program, Step, Team
from model_worker.engine.ops.linear import QuantizedRows, QuantizeRows


def _quantize(team: Team, x: Tensor) -> QuantizedRows:
    rows = QuantizedRows.allocate(len(x), x.shape[1])
    rows.values.fill_(99)
    rows.scales.fill_(math.nan)
    rows.sums.fill_(99)
    Program(team, [QuantizeRows("quantize", x, rows)]).run(Step.of_rows(len(x)))
    return rows


def _groups(x: Tensor) -> Tensor:
    return torch.nn.functional.pad(x, (0, -x.shape[1] % 32)).view(len(x), -1, 32)


@pytest.mark.parametrize("num_inputs", [1, 31, 32, 40, 96, 576, 1000])
@pytest.mark.parametrize("magnitude", [1e-30, 1.0, 3e38])
def test_values_scales_and_sums(team: Team, num_inputs: int, magnitude: float) -> None:
    torch.manual_seed(0)
    whole = torch.full((9, num_inputs + 3), math.nan)
    x = whole[:, :num_inputs].uniform_(-1, 1).mul_(magnitude)
    rows = _quantize(team, x)
    expected = QuantizedRows.allocate(9, num_inputs)
    QuantizeRows("quantize", x, expected).reference(Step.of_rows(9))
    assert torch.equal(rows.scales, expected.scales)
    assert torch.equal(rows.sums, _groups(rows.values).sum(dim=-1, dtype=torch.int32))
    assert (rows.values[:, num_inputs:] == 0).all()
    # With fused multiplication and addition a value within rounding of a half may go the other way.
    error = (_groups(rows.values) * rows.scales.double()[..., None] - _groups(x)).abs()
    assert (error <= 0.50001 * rows.scales.double()[..., None]).all()
    assert (rows.values.int() - expected.values.int()).abs().max() <= 1
    assert _groups(rows.values).abs().amax(dim=-1).eq(127).all()


def test_halves_are_rounded_to_even(team: Team) -> None:
    values = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, -127.0])
    rows = _quantize(team, values[None])
    assert rows.values[0, :8].tolist() == [127, 0, 2, 2, 0, -2, -2, -127]
    assert rows.scales.item() == 1.0
    assert rows.sums.item() == 0


@pytest.mark.parametrize("value", [0.0, -0.0, 1e-45, -1e-40, 1e-37])
def test_groups_of_next_to_nothing_are_zero(team: Team, value: float) -> None:
    """127 / peak would be infinite."""
    rows = _quantize(team, torch.tensor([[value, 0.0] * 16]))
    assert (rows.values == 0).all()
    assert rows.sums.item() == 0
    assert rows.scales.item() <= 1e-38


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 5, 31])
def test_a_bad_value_makes_the_scale_of_its_group_bad(team: Team, bad: float, place: int) -> None:
    """A group of zeros in its place would make the model answer nonsense in silence."""
    x = torch.ones(1, 64)
    x[0, place] = bad
    rows = _quantize(team, x)
    assert not rows.scales[0, 0].isfinite()
    assert rows.scales[0, 1].item() == pytest.approx(1 / 127)
    assert rows.sums[0, 1].item() == 32 * 127


def test_no_rows(team: Team) -> None:
    _quantize(team, torch.empty(0, 64))

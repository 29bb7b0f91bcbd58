"""The kernel rounds to 4 bits exactly as torch does, on every machine level."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compression.int4 import quantize_int4
from model_worker.engine.ops.cpu.program import Team
from model_worker.engine.ops.int4_grid import quantize_int4_natively
from registry.errors import CheckpointError, UnsupportedModelError


def _random(rows: int, columns: int, scale: float = 0.05, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    generator = torch.Generator().manual_seed(rows + columns)
    return (torch.randn(rows, columns, generator=generator) * scale).to(dtype)


def _with_special_groups() -> Tensor:
    """Groups that are constant, zero, of one outlier, of few values, tiny, and large."""
    weight = _random(9, 96, dtype=torch.float32)
    weight[0] = 0.0
    weight[1] = -3.25
    weight[2, 5] = 100.0
    weight[3] = (weight[3] * 40).round() / 8
    weight[4] *= 1e-7
    weight[5] *= 1e-30
    weight[6] *= 1e5
    weight[7] = torch.arange(96) % 16 * 0.125 - 1.0
    weight[8] += 1000.0
    return weight


@pytest.mark.parametrize(
    "weight",
    [
        _random(1, 32),
        _random(3, 32),
        _random(7, 96, dtype=torch.float16),
        _random(577, 160),
        _random(300, 1536, scale=2.0, dtype=torch.float32),
        _random(64, 576, scale=1e-4, dtype=torch.float32),
        _random(70, 64)[:, :32],
        _with_special_groups(),
    ],
    ids=lambda weight: f"{tuple(weight.shape)}",
)
def test_it_gives_the_same_bits_as_torch(weight: Tensor, team: Team) -> None:
    expected = quantize_int4(weight)
    ours = quantize_int4_natively(weight, team)
    assert ours.minimums is not None
    assert expected.minimums is not None
    assert torch.equal(ours.scales, expected.scales)
    assert torch.equal(ours.minimums, expected.minimums)
    assert torch.equal(ours.values, expected.values)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_refused(value: float, team: Team) -> None:
    weight = _random(40, 64)
    weight[33, 7] = value
    with pytest.raises(CheckpointError, match="infinite values or NaN"):
        quantize_int4_natively(weight, team)


@pytest.mark.parametrize("ends", [(0.0, 65520.0 * 15), (65520.0, 65530.0), (-65520.0, 0.0)])
def test_a_grid_beyond_float16_is_refused(ends: tuple[float, float], team: Team) -> None:
    weight = torch.tensor(ends).repeat(1, 16)
    with pytest.raises(UnsupportedModelError, match="too large to be quantized"):
        quantize_int4_natively(weight, team)


def test_rows_that_are_not_whole_groups_are_refused(team: Team) -> None:
    with pytest.raises(UnsupportedModelError, match="multiple of 32"):
        quantize_int4_natively(torch.zeros(2, 33), team)

"""RMSNorm on every machine level: the kernel does what `reference` says, and writes nowhere else."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from model_worker.engine.ops.cpu.program import Program, Step, Team
from model_worker.engine.ops.rms_norm import RMSNorm


def _norm(team: Team, x: Tensor, epsilon: float = 1e-5) -> Tensor:
    out = torch.zeros_like(x)
    Program(team, [RMSNorm("norm", x, torch.ones(x.shape[1]), out, epsilon)]).run(Step.of_rows(len(x)))
    return out


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    num_rows=st.integers(0, 20),
    num_heads=st.integers(1, 4),
    size=st.integers(1, 100),
    gap=st.integers(0, 3),
    own_weights=st.booleans(),
    in_place=st.booleans(),
    accumulate=st.booleans(),
    alpha=st.sampled_from([1.0, 0.25, -3.0]),
    seed=st.integers(0, 1000),
)
def test_every_option(
    team: Team,
    num_rows: int,
    num_heads: int,
    size: int,
    gap: int,
    own_weights: bool,
    in_place: bool,
    accumulate: bool,
    alpha: float,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    width = num_heads * size
    whole = torch.randn(num_rows + 1, width + gap)
    x = torch.full((num_rows + 1, width + gap), math.nan)[:, :width].normal_()
    weight = torch.randn(width if own_weights else size)
    out = whole[:num_rows, :width]
    before = whole.clone()
    if in_place:
        out.copy_(x[:num_rows])
        before = whole.clone()
    norm = RMSNorm("norm", out if in_place else x[:num_rows], weight, out, 1e-5, num_heads, accumulate, alpha)
    Program(team, [norm]).run(Step.of_rows(num_rows))
    got = whole.clone()
    whole.copy_(before)
    norm.reference(Step.of_rows(num_rows))
    torch.testing.assert_close(got, whole, rtol=2e-6, atol=2e-6)
    assert torch.equal(got[num_rows:], before[num_rows:])
    assert torch.equal(got[:, width:], before[:, width:])


def test_a_row_of_zeros_stays_zero(team: Team) -> None:
    assert (_norm(team, torch.zeros(2, 40)) == 0).all()


@pytest.mark.parametrize("place", [0, 17, 39])
def test_what_is_not_a_number_spoils_its_row_and_no_other(team: Team, place: int) -> None:
    x = torch.ones(3, 40)
    x[1, place] = math.nan
    out = _norm(team, x)
    assert out[1].isnan().all()
    assert out[[0, 2]].isfinite().all()


def test_an_infinity_is_not_hidden(team: Team) -> None:
    x = torch.ones(1, 40)
    x[0, 3] = -math.inf
    out = _norm(team, x)
    assert out[0, 3].isnan()

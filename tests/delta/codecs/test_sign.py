from __future__ import annotations

import pytest
import torch
from torch import Tensor

from delta.codecs.sign import SIGN, encode_sign, encode_sign_with_one_scale, fit_scales


def _error(difference: Tensor, *, one_scale: bool = False) -> float:
    """‖D - what is given back‖² / ‖D‖²"""
    term = encode_sign_with_one_scale(difference) if one_scale else encode_sign(difference)
    left = -difference
    SIGN.add_to(left, term.parts)
    return float(left.norm() ** 2 / difference.norm() ** 2)


def test_scales_of_rows_and_columns_are_found_exactly() -> None:
    torch.manual_seed(1)
    signs = torch.randint(0, 2, (30, 50)) * 2 - 1
    rows, columns = torch.rand(30) + 0.1, torch.rand(50) + 0.1
    for difference in (signs * rows[:, None] * columns, signs * rows[:, None], signs * columns, signs * 3.0):
        assert _error(difference) < 1e-10


def test_two_thirds_of_a_gaussian_change_are_captured() -> None:
    torch.manual_seed(1)
    assert _error(torch.randn(300, 400)) == pytest.approx(1 - 2 / torch.pi, abs=0.01)


def test_never_worse_than_one_scale() -> None:
    torch.manual_seed(1)
    for spread in (0.0, 0.5, 2.0):
        difference = torch.randn(64, 96) * (torch.randn(64, 1) * spread).exp() * (torch.randn(96) * spread).exp()
        assert _error(difference) <= _error(difference, one_scale=True)
    assert _error(difference) < 0.5 * _error(difference, one_scale=True)


def test_the_fit_is_the_best_of_rank_one() -> None:
    torch.manual_seed(1)
    difference = torch.randn(40, 60) * torch.rand(40, 1) * torch.rand(60)
    u, v = fit_scales(difference)
    left, sizes, right = torch.linalg.svd(difference.abs())
    best = (difference.abs() - sizes[0] * left[:, :1] @ right[:1]).norm()
    assert float((difference.abs() - u[:, None] * v).norm()) <= 1.0001 * float(best)
    assert float(v.mean()) == pytest.approx(1)


def test_rows_and_columns_without_changes_get_no_scale() -> None:
    difference = torch.zeros(4, 6)
    assert _error(torch.eye(4, 6)) <= 1
    assert not SIGN.terms(encode_sign(difference).parts, (4, 6)).signs[0].row_scale.any()
    difference[1, 2:] = 3.0
    back = torch.zeros(4, 6)
    SIGN.add_to(back, encode_sign(difference).parts)
    torch.testing.assert_close(back, difference)


def test_bits_are_where_the_terms_expect_them() -> None:
    difference = torch.tensor([[1.0, -1, -1, -1, -1, -1, -1, -1, 1, 0]])
    assert encode_sign(difference).parts["bits"].tolist() == [[1, 3]]


def test_bits_beyond_the_last_column_are_refused() -> None:
    parts = dict(encode_sign(torch.ones(2, 10)).parts)
    parts["bits"] = parts["bits"].clone()
    parts["bits"][1, 1] |= 1 << 2
    with pytest.raises(ValueError, match="beyond column 10"):
        SIGN.check(parts, (2, 10))

from __future__ import annotations

import pytest
import torch

from delta.codecs.sign import SIGN, encode_sign
from delta.codecs.ternary import TERNARY, encode_ternary


def test_what_did_not_change_stays() -> None:
    torch.manual_seed(1)
    changed = torch.rand(300, 400) < 0.2
    difference = torch.where(changed, torch.randn(300, 400), 0.0)
    left, left_of_signs = -difference, -difference
    TERNARY.add_to(left, encode_ternary(difference).parts)
    SIGN.add_to(left_of_signs, encode_sign(difference).parts)
    assert not left[~changed].any()
    # Signs alone capture p times what they capture of the changes alone.
    assert float(left.norm() ** 2 / difference.norm() ** 2) == pytest.approx(1 - 2 / torch.pi, abs=0.05)
    assert float(left_of_signs.norm() ** 2 / difference.norm() ** 2) > 0.85


def test_scales_are_found_exactly() -> None:
    torch.manual_seed(1)
    signs = torch.randint(-1, 2, (30, 50))
    difference = signs * (torch.rand(30, 1) + 0.1) * (torch.rand(50) + 0.1)
    back = torch.zeros(30, 50)
    TERNARY.add_to(back, encode_ternary(difference).parts)
    torch.testing.assert_close(back, difference, rtol=1e-3, atol=1e-6)


def test_served_as_two_planes_that_agree_where_it_is_not_0() -> None:
    difference = torch.tensor([[2.0, 0, -2]])
    above, below = TERNARY.terms(encode_ternary(difference).parts, (1, 3)).signs
    assert (above.bits.tolist(), below.bits.tolist()) == ([[0b011]], [[0b001]])
    assert above.column_scale is not None
    assert (above.row_scale * above.column_scale).tolist() == pytest.approx([1, 0, 1])


def test_nothing_changed_and_everything_changed() -> None:
    for difference in (torch.zeros(3, 9), torch.ones(3, 9)):
        term = encode_ternary(difference)
        TERNARY.check(term.parts, (3, 9))
        back = torch.zeros(3, 9)
        TERNARY.add_to(back, term.parts)
        assert torch.equal(back, difference)


def test_counts_that_do_not_agree_are_refused() -> None:
    parts = dict(encode_ternary(torch.eye(12)).parts)
    for name, damaged, message in (
        ("bitmap", torch.full((12, 2), 0b1111, dtype=torch.uint8), "positive is"),
        ("bitmap", torch.full((12, 2), 255, dtype=torch.uint8), "beyond column 12"),
        ("positive", torch.tensor([255, 255], dtype=torch.uint8), "beyond the 12 of bitmap"),
    ):
        with pytest.raises(ValueError, match=message):
            TERNARY.check({**parts, name: damaged}, (12, 12))

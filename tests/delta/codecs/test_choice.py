"""Every rule on a matrix made for it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from delta.codecs.choice import changed_share, encode_matrix, low_rank_components
from delta.codecs.codec import Term
from delta.codecs.policy import CodecPolicy
from delta.codecs.registry import DIFFERENCE_CODECS
from delta.same_bits import same_bits

SHAPE = (320, 448)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(1)


def _base() -> Tensor:
    return torch.randn(SHAPE).bfloat16()


def _codecs(base: Tensor, target: Tensor, policy: CodecPolicy | None = None) -> list[str]:
    return [term.codec for term in encode_matrix(base, target, policy or CodecPolicy()).terms]


def _error(base: Tensor, target: Tensor, terms: tuple[Term, ...]) -> float:
    weight = base.float().clone()
    for term in terms:
        DIFFERENCE_CODECS[term.codec].add_to(weight, term.parts)
    return float((weight - target.float()).norm() / (base.float() - target.float()).norm())


def test_a_dense_change_gets_signs() -> None:
    base = _base()
    assert _codecs(base, base.float() + torch.randn(SHAPE) * 0.01) == ["sign"]


@pytest.mark.parametrize("changed", [0.05, 0.3, 0.55])
def test_the_change_of_reinforcement_learning_gets_zeros_too(changed: float) -> None:
    base = _base()
    where = torch.rand(SHAPE) < changed
    assert _codecs(base, base.float() + torch.randn(SHAPE) * 0.01 * where) == ["ternary"]


def test_changes_whose_squares_are_nothing_get_signs_too() -> None:
    assert _codecs(torch.zeros(SHAPE), torch.randn(SHAPE) * 1e-26) == ["sign"]


def test_few_changes_are_kept_exactly() -> None:
    base = _base()
    target = torch.where(torch.rand(SHAPE) < 0.01, torch.randn(SHAPE).bfloat16(), base)
    assert _codecs(base, target) == ["sparse"]


@pytest.mark.parametrize("rank", [1, 16, 40])
def test_a_merged_lora_gets_its_rank(rank: int) -> None:
    base = torch.randn(SHAPE)
    target = base + torch.randn(SHAPE[0], rank) @ torch.randn(rank, SHAPE[1]) * 1e-3
    (term,) = encode_matrix(base, target, CodecPolicy()).terms
    assert term.codec == "lowrank"
    assert len(term.parts["a"]) <= rank
    assert _error(base, target, (term,)) < 0.05


def test_small_matrices_are_not_low_rank_because_they_are_small() -> None:
    base = torch.randn(48, 64)
    assert _codecs(base, base + torch.randn(48, 64) * 0.01) == ["sign"]


def test_low_rank_with_some_noise_is_low_rank_still_and_with_much_is_not() -> None:
    change = torch.randn(SHAPE[0], 16) @ torch.randn(16, SHAPE[1]) / 4
    assert low_rank_components(change + 0.2 * torch.randn(SHAPE)) is not None
    assert low_rank_components(change + 0.4 * torch.randn(SHAPE)) is None
    assert low_rank_components(torch.randn(SHAPE)) is None


def test_low_rank_in_a_few_rows_is_found() -> None:
    change = torch.zeros(4000, 448)
    change[::40] = torch.randn(100, 8) @ torch.randn(8, 448)
    change += 0.001 * torch.randn(4000, 448)
    assert low_rank_components(change) is not None


def test_nothing_but_the_sign_of_zeros_or_the_dtype() -> None:
    base = _base()
    base[0, 0] = 0
    target = base.clone()
    target[0, 0] = -0.0
    assert _codecs(base, target) == []
    assert _codecs(base, base.float()) == []


def test_residuals_follow() -> None:
    base = _base()
    target = base.float() + torch.randn(SHAPE) * 0.01
    errors = []
    for residuals in ((), ("lowrank",), ("sign",), ("sign", "lowrank"), ("sign", "sign", "sign")):
        policy = CodecPolicy(residuals=residuals)
        assert _codecs(base, target, policy) == ["sign", *residuals]
        errors.append(_error(base, target, encode_matrix(base, target, policy).terms))
    assert errors == sorted(errors, reverse=True)
    assert errors[0] == pytest.approx((1 - 2 / torch.pi) ** 0.5, abs=0.01)
    assert errors[-1] < 0.2


def test_components_are_taken_out_before_signs_are_fitted() -> None:
    low_rank = torch.randn(SHAPE[0], 8) @ torch.randn(8, SHAPE[1]) * 1e-3
    base = torch.zeros(SHAPE)
    target = low_rank + 2e-3 * torch.randn(SHAPE)
    terms = encode_matrix(base, target, CodecPolicy("sign", residuals=("lowrank",), rank=8)).terms
    product = torch.zeros(SHAPE)
    DIFFERENCE_CODECS["lowrank"].add_to(product, terms[1].parts)
    assert float((product - low_rank).norm() / low_rank.norm()) < 0.35
    assert _error(base, target, terms) < 0.5


@pytest.mark.parametrize("codec", ["sign", "ternary", "lowrank", "sparse", "dense", "lossless"])
def test_a_named_codec_is_taken(codec: str) -> None:
    base = torch.randn(SHAPE)
    where = torch.rand(SHAPE) < 0.3
    target = base + torch.randn(SHAPE) * 0.01 * where
    assert _codecs(base.bfloat16(), target.bfloat16(), CodecPolicy(codec)) == [codec]  # type: ignore[arg-type]


def test_what_no_difference_gives_back_is_replaced() -> None:
    base, target = torch.zeros(20, 30), torch.full((20, 30), -0.0)
    assert _codecs(base, target, CodecPolicy("dense")) == ["replace"]
    assert _codecs(base, target, CodecPolicy("sparse")) == ["replace"]
    assert _codecs(torch.zeros(2, 3, dtype=torch.int64), torch.ones(2, 3, dtype=torch.int64)) == ["replace"]


def test_what_would_be_no_smaller_is_exact() -> None:
    base = torch.randn(2, 3).bfloat16()
    target = torch.randn(2, 3).bfloat16()
    (term,) = encode_matrix(base, target, CodecPolicy()).terms
    assert term.codec in ("dense", "replace")


def test_values_that_are_not_finite() -> None:
    base, target = torch.randn(20, 30), torch.randn(20, 30)
    for value in (float("nan"), float("inf")):
        target[3, 4] = value
        assert _codecs(base, target) == ["replace"]
        assert _codecs(base, target, CodecPolicy("dense")) == ["replace"]
        assert _codecs(base, target, CodecPolicy("lossless")) == ["lossless"]


def test_share_of_changes() -> None:
    difference = torch.zeros(10, 10)
    difference[0, :3] = 1
    assert changed_share(difference) == 0.03


def test_exact_choices_are_exact() -> None:
    base = _base()
    target = torch.where(torch.rand(SHAPE) < 0.01, torch.randn(SHAPE).bfloat16(), base)
    (term,) = encode_matrix(base, target, CodecPolicy()).terms
    weight = base.float()
    DIFFERENCE_CODECS[term.codec].add_to(weight, term.parts)
    assert same_bits(weight.bfloat16(), target)

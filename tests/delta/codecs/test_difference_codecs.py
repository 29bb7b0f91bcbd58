"""What all codecs of differences have in common: `DifferenceCodec`."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from delta.codecs.codec import Term
from delta.codecs.dense import encode_dense
from delta.codecs.lowrank import encode_low_rank
from delta.codecs.registry import DIFFERENCE_CODECS
from delta.codecs.sign import encode_sign, encode_sign_with_one_scale
from delta.codecs.sparse import encode_sparse
from delta.codecs.ternary import encode_ternary
from delta.merge_terms import merge_linear

SHAPES = ((5, 24), (7, 13), (1, 1), (3, 300_000))


def _difference(shape: tuple[int, int], changed: float = 0.3) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    where = torch.rand(shape, generator=generator) < changed
    return torch.where(where, torch.randn(shape, generator=generator), 0.0)


def _sparse(difference: Tensor) -> Term:
    term = encode_sparse(torch.zeros_like(difference), difference)
    assert term is not None
    return term


def _dense(difference: Tensor) -> Term:
    term = encode_dense(torch.zeros_like(difference), difference)
    assert term is not None
    return term


ENCODERS: dict[str, Callable[[Tensor], Term]] = {
    "sign": encode_sign,
    "sign, one scale": encode_sign_with_one_scale,
    "ternary": encode_ternary,
    "lowrank": lambda difference: encode_low_rank(difference, 3),
    "sparse": _sparse,
    "dense": _dense,
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("encoder", ENCODERS)
def test_applied_and_served_are_the_same_difference(encoder: str, shape: tuple[int, int]) -> None:
    term = ENCODERS[encoder](_difference(shape))
    codec = DIFFERENCE_CODECS[term.codec]
    codec.check(term.parts, shape)
    assert all(part.is_contiguous() for part in term.parts.values())
    applied = torch.zeros(shape)
    codec.add_to(applied, term.parts)
    served, _ = merge_linear(torch.zeros(shape), None, codec.terms(term.parts, shape))
    torch.testing.assert_close(applied, served, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_the_difference_is_added_to_what_is_there(encoder: str) -> None:
    term = ENCODERS[encoder](_difference((4, 20)))
    codec = DIFFERENCE_CODECS[term.codec]
    alone, weight = torch.zeros(4, 20), torch.arange(80.0).reshape(4, 20)
    codec.add_to(alone, term.parts)
    expected = weight + alone
    codec.add_to(weight, term.parts)
    torch.testing.assert_close(weight, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_damaged_parts_are_refused(encoder: str) -> None:
    shape = (4, 20)
    term = ENCODERS[encoder](_difference(shape))
    codec = DIFFERENCE_CODECS[term.codec]
    for name, part in term.parts.items():
        others = {key: other for key, other in term.parts.items() if key != name}
        damaged: list[dict[str, Tensor]] = [
            {**others, name: part.double()},
            {**others, name: part[:-1]},
            {**others, name: part[None]},
        ]
        if name != "column_scale":
            damaged.append(others)
        if part.is_floating_point():
            for value in (float("nan"), float("inf")):
                damaged.append({**others, name: part.clone().fill_(value)})
        for parts in damaged:
            with pytest.raises(ValueError, match=name):
                codec.check(parts, shape)
    with pytest.raises(ValueError, match="more"):
        codec.check({**term.parts, "more": torch.zeros(1)}, shape)
    with pytest.raises(ValueError):
        codec.check(term.parts, (5, 20))

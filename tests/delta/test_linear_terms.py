"""Blocks of rows put together are what the blocks are by themselves."""

from __future__ import annotations

import pytest
import torch

from delta.linear_terms import block_of_rows, stacked
from delta.merge_terms import merge_linear
from delta.variant_terms import LinearTerms
from tests.fakes.random_terms import random_plane, random_sparse

_COLUMNS = 20
_KINDS = ("nothing", "low rank", "signs", "sparse", "dense", "whole")


def _terms(kind: str, num_rows: int) -> LinearTerms:
    return {
        "nothing": LinearTerms(),
        "low rank": LinearTerms(a=torch.randn(3, _COLUMNS), b=torch.randn(num_rows, 3)),
        "signs": LinearTerms(signs=(random_plane(num_rows, _COLUMNS), random_plane(num_rows, _COLUMNS))),
        "sparse": LinearTerms(sparse=random_sparse(num_rows, _COLUMNS)),
        "dense": LinearTerms(dense=torch.randn(num_rows, _COLUMNS, dtype=torch.bfloat16)),
        "whole": LinearTerms(output_scale=torch.zeros(num_rows), dense=torch.randn(num_rows, _COLUMNS)),
    }[kind]


@pytest.mark.parametrize("first", _KINDS)
@pytest.mark.parametrize("second", _KINDS)
def test_two_blocks(first: str, second: str) -> None:
    torch.manual_seed(0)
    weight = torch.randn(12, _COLUMNS)
    blocks = [(5, _terms(first, 5)), (7, _terms(second, 7))]
    found, _ = merge_linear(weight, None, stacked(blocks, _COLUMNS))
    expected = [
        merge_linear(rows, None, terms)[0] for rows, (_, terms) in zip(weight.split([5, 7]), blocks, strict=True)
    ]
    torch.testing.assert_close(found, torch.cat(expected))


@pytest.mark.parametrize("kind", ["low rank", "signs", "sparse", "dense"])
def test_blocks_cut_and_put_together_again(kind: str) -> None:
    torch.manual_seed(0)
    terms = _terms(kind, 12)
    blocks = [(4, block_of_rows(terms, slice(0, 4))), (8, block_of_rows(terms, slice(4, 12)))]
    weight = torch.randn(12, _COLUMNS)
    found, _ = merge_linear(weight, None, stacked(blocks, _COLUMNS))
    torch.testing.assert_close(found, merge_linear(weight, None, terms)[0])

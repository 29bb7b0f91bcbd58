"""How weights are divided among ranks."""

from __future__ import annotations

import pytest
import torch

from model_worker.engine.parallel.sharding import (
    Division,
    Part,
    Share,
    check_divisible,
    check_groups,
    cut,
    inputs,
    outputs,
)
from registry.errors import UnsupportedModelError

HEADS = Part(8, 4, "attention heads")  # of two numbers each
KV_HEADS = Part(4, 2, "KV heads", repeats=True)


def _shares(num_ranks: int) -> list[Share]:
    return [Share(rank, num_ranks) for rank in range(num_ranks)]


def test_every_rank_gets_its_heads_of_each_part() -> None:
    division = outputs(HEADS, KV_HEADS, KV_HEADS)
    assert [division.ranges(share) for share in _shares(2)] == [
        [(0, 4), (8, 10), (12, 14)],
        [(4, 8), (10, 12), (14, 16)],
    ]
    assert [division.size(share) for share in _shares(2)] == [8, 8]


def test_ranks_repeat_kv_heads_of_which_there_are_fewer() -> None:
    division = outputs(KV_HEADS)
    assert [division.ranges(share) for share in _shares(4)] == [[(0, 2)], [(0, 2)], [(2, 4)], [(2, 4)]]


def test_one_rank_has_all_of_it_in_one_stretch() -> None:
    assert outputs(HEADS, KV_HEADS, KV_HEADS).ranges(Share(0, 1)) == [(0, 16)]


def test_tokens_are_divided_even_where_they_do_not_divide() -> None:
    tokens = outputs(Part(10, 10, "tokens", uneven=True))
    assert [tokens.ranges(share) for share in _shares(4)] == [[(0, 2)], [(2, 5)], [(5, 7)], [(7, 10)]]


def test_what_the_ranks_cut_is_the_whole() -> None:
    weight = torch.randn(8, 6)
    division = outputs(HEADS)
    assert torch.equal(torch.cat([cut(weight, 0, division, share) for share in _shares(4)]), weight)
    assert cut(weight, 0, division, Share(1, 2)).data_ptr() == weight[4:].data_ptr()  # read from the file, not copied


def test_a_number_of_ranks_that_does_not_divide_is_refused_with_those_that_do() -> None:
    heads, kv_heads, neurons = (
        Part(9, 9, "attention heads"),
        Part(3, 3, "KV heads", repeats=True),
        Part(6, 6, "neurons"),
    )
    check_divisible([heads, kv_heads, neurons], 3)
    with pytest.raises(UnsupportedModelError, match=r"9 attention heads .* among 2. Possible are 1 and 3"):
        check_divisible([heads, kv_heads, neurons], 2)
    with pytest.raises(UnsupportedModelError, match=r"Possible are 1, 3 and 9"):
        check_divisible([heads, kv_heads], 2)


def test_groups_have_to_divide_too() -> None:
    division = {"down": inputs(Part(96, 96, "neurons"))}
    check_groups(division, 3)
    with pytest.raises(UnsupportedModelError, match=r"3 groups of 32 neurons cannot be divided among 2"):
        check_groups(division, 2)
    check_groups({"up": Division(False, (Part(96, 96, "neurons"),))}, 2)  # rows are whole groups

from __future__ import annotations

import pytest
from hypothesis import given, strategies as st

from model_worker.engine.layer_groups import group_layers
from model_worker.engine.layers.attention import ForwardContext, KVShape, PagedAttention
from model_worker.engine.ops.paged_attention import AttentionParams
from model_worker.engine.visibility import Visibility

FULL, WINDOW = Visibility(), Visibility(sliding_window=8)
SHAPE = KVShape(2, 4, 4)


def layers(pattern: str, *, window: int = 8, odd: int | None = None) -> list[PagedAttention]:
    """One layer for each letter: f(ull), w(indow), c(hunk); the one at `odd` keeps more of a token."""
    limits = {"f": {}, "w": {"sliding_window": window}, "c": {"chunk_size": 16}}
    return [
        PagedAttention(
            ForwardContext(),
            AttentionParams(scale=1.0, **limits[letter]),
            KVShape(2, 8, 4) if index == odd else SHAPE,
        )
        for index, letter in enumerate(pattern)
    ]


def test_one_kind_is_one_group_whatever_its_layers_keep() -> None:
    groups = group_layers(layers("www", odd=1), max_model_len=100)
    assert groups.visibility == (WINDOW,)
    assert groups.members == ((0, 1, 2),)
    assert groups.slots == (0, 1, 2)


def test_alternating_layers_make_two_groups_of_half_the_size() -> None:
    groups = group_layers(layers("wfwf"), max_model_len=100)
    assert groups.visibility == (WINDOW, FULL)
    assert groups.members == ((0, 2), (1, 3))
    assert groups.slots == (0, 2)


@pytest.mark.parametrize(
    ("pattern", "num_groups", "size"),
    [
        ("wwwwwf" * 4, 6, 4),  # 20 and 4
        (("wwwwwf" * 5)[:26], 7, 4),  # 22 and 4: the last group of windows has 2
        ("cccf" * 12, 4, 12),
        ("f" + "w" * 40, 6, 8),  # with one layer each there would be 41
    ],
)
def test_few_slots_stay_unused_in_few_groups(pattern: str, num_groups: int, size: int) -> None:
    groups = group_layers(layers(pattern), max_model_len=100)
    assert (groups.num_groups, len(groups.slots)) == (num_groups, size)


def test_a_window_beyond_the_longest_request_is_none() -> None:
    groups = group_layers(layers("wfwf", window=100), max_model_len=100)
    assert groups.visibility == (FULL,)
    assert groups.members == ((0, 1, 2, 3),)


def test_layers_that_fit_no_common_slot_see_everything() -> None:
    groups = group_layers(layers("wfwf", odd=2), max_model_len=100)
    assert groups.visibility == (FULL,)
    assert len(groups.slots) == 4


def test_a_model_with_one_block_table_gets_one_group() -> None:
    assert group_layers(layers("wfwf"), max_model_len=100, mixed=False).visibility == (FULL,)
    assert group_layers(layers("ww"), max_model_len=100, mixed=False).visibility == (WINDOW,)


@given(st.text("fwc", min_size=1, max_size=60))
def test_every_layer_is_in_one_group_of_its_kind(pattern: str) -> None:
    attentions = layers(pattern)
    groups = group_layers(attentions, max_model_len=100)
    assert sorted(layer for members in groups.members for layer in members) == list(range(len(pattern)))
    for visibility, members in zip(groups.visibility, groups.members, strict=True):
        assert {attentions[layer].params.visibility for layer in members} == {visibility}
        assert len(members) <= len(groups.slots)


def test_windowed_groups_hold_a_bounded_number_of_blocks() -> None:
    groups = group_layers(layers("wfwf"), max_model_len=10_000)
    assert groups.max_blocks(4_000, block_size=16, max_step_tokens=64) == 250 + 7
    assert groups.max_blocks(16, block_size=16, max_step_tokens=64) == 1 + 1

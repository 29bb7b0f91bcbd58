"""The fast paged attention equals the readable one on random batches of every kind."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings, strategies as st

from model_worker.engine.ops.paged_attention import (
    Alibi,
    AttentionMetadata,
    AttentionParams,
    paged_attention,
    write_kv,
)
from model_worker.engine.ops.paged_attention.reference import paged_attention_reference
from tests.model_worker.engine.ops.paged_attention.attention_batches import TOLERANCE, batch


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


_DECODE = st.tuples(st.integers(0, 150), st.just(1))
_PROMPT = st.tuples(st.just(0), st.integers(2, 60))
_CHUNK = st.tuples(st.integers(1, 90), st.integers(2, 40))


@st.composite
def _batches(draw: st.DrawFn) -> list[tuple[int, int]]:
    kinds = draw(st.sampled_from([_DECODE, _PROMPT, _CHUNK, st.one_of(_DECODE, _PROMPT, _CHUNK)]))
    return draw(st.lists(kinds, min_size=1, max_size=9))


@settings(max_examples=150, deadline=None)
@given(
    lengths=_batches(),
    block_size=st.sampled_from([1, 4, 8, 16, 32]),
    heads=st.sampled_from([(4, 4), (4, 2), (6, 1), (9, 3)]),
    dims=st.sampled_from([(8, 8), (24, 16), (16, 24)]),
    window=st.sampled_from([None, 1, 7, 33]),
    chunk=st.sampled_from([None, 5, 32]),
    softcap=st.sampled_from([None, 3.0]),
    with_sinks=st.booleans(),
    alibi_dtype=st.sampled_from([None, torch.float32, torch.bfloat16]),
    dtype=st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 2**16),
)
def test_equals_the_reference(
    lengths: list[tuple[int, int]],
    block_size: int,
    heads: tuple[int, int],
    dims: tuple[int, int],
    window: int | None,
    chunk: int | None,
    softcap: float | None,
    with_sinks: bool,
    alibi_dtype: torch.dtype | None,
    dtype: torch.dtype,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    metadata, num_blocks = batch(lengths, block_size)
    num_heads, num_kv_heads = heads
    key_cache = torch.randn(num_blocks, block_size, num_kv_heads, dims[0]).to(dtype)
    value_cache = torch.randn(num_blocks, block_size, num_kv_heads, dims[1]).to(dtype)
    query = torch.randn(metadata.query_start[-1], num_heads, dims[0]).to(dtype)
    params = AttentionParams(
        scale=0.3,
        sliding_window=window,
        chunk_size=chunk,
        softcap=softcap,
        sinks=torch.randn(num_heads) if with_sinks else None,
        alibi=None if alibi_dtype is None else Alibi(torch.rand(num_heads).to(alibi_dtype), 0.5),
    )
    out = paged_attention(query, key_cache, value_cache, metadata, params)
    expected = paged_attention_reference(query, key_cache, value_cache, metadata, params)
    assert out.shape == (len(query), num_heads, dims[1])
    assert out.dtype == dtype
    torch.testing.assert_close(out, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("softcap", [None, 50.0])
@pytest.mark.parametrize("lengths", [[(1990, 1), (1000, 1)], [(1990, 20)]])
def test_position_biases_of_far_positions_are_exact_in_half_precision(
    lengths: list[tuple[int, int]], softcap: float | None
) -> None:
    torch.manual_seed(3)
    metadata, num_blocks = batch(lengths, 16)
    key_cache, value_cache = torch.randn(2, num_blocks, 16, 4, 16).bfloat16().unbind(0)
    query = torch.randn(metadata.query_start[-1], 4, 16).bfloat16()
    params = AttentionParams(scale=0.25, softcap=softcap, alibi=Alibi(torch.tensor([0.71, 0.5, 0.25, 0.0625])))
    out = paged_attention(query, key_cache, value_cache, metadata, params)
    expected = paged_attention_reference(query, key_cache, value_cache, metadata, params)
    torch.testing.assert_close(out, expected, rtol=0.05, atol=0.05)


def test_the_reference_is_plain_attention() -> None:
    torch.manual_seed(0)
    metadata, num_blocks = batch([(0, 20)], 8)
    key_cache, value_cache = torch.randn(2, num_blocks, 8, 2, 4).unbind(0)
    query = torch.randn(20, 2, 4)
    blocks = metadata.block_tables[0, :3].long()
    k, v = (cache[blocks].flatten(0, 1)[:20].transpose(0, 1) for cache in (key_cache, value_cache))
    expected = torch.nn.functional.scaled_dot_product_attention(query.transpose(0, 1), k, v, is_causal=True, scale=0.7)
    out = paged_attention_reference(query, key_cache, value_cache, metadata, AttentionParams(scale=0.7))
    torch.testing.assert_close(out, expected.transpose(0, 1))


def test_layers_that_see_different_positions_share_one_batch() -> None:
    torch.manual_seed(1)
    metadata, num_blocks = batch([(40, 1), (0, 30)], 8)
    key_cache, value_cache = torch.randn(2, num_blocks, 8, 2, 8).unbind(0)
    query = torch.randn(31, 4, 8)
    for params in (
        AttentionParams(scale=0.3),
        AttentionParams(scale=0.3, sliding_window=5),
        AttentionParams(scale=0.3, softcap=2.0),
        AttentionParams(scale=0.3, alibi=Alibi(torch.rand(4))),
    ):
        out = paged_attention(query, key_cache, value_cache, metadata, params)
        torch.testing.assert_close(out, paged_attention_reference(query, key_cache, value_cache, metadata, params))


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    torch.manual_seed(2)
    metadata, num_blocks = batch([(30, 1), (33, 1), (90, 1), (3, 1)], 8)
    key_cache, value_cache = torch.randn(2, num_blocks, 8, 2, 8).unbind(0)
    query = torch.randn(4, 4, 8)
    params = AttentionParams(scale=0.3)
    together = paged_attention(query, key_cache, value_cache, metadata, params)
    for row in range(4):
        alone = AttentionMetadata(
            metadata.block_tables[row : row + 1], (0, 1), (metadata.seq_lens[row],), metadata.positions[row : row + 1]
        )
        out = paged_attention(query[row : row + 1], key_cache, value_cache, alone, params)
        torch.testing.assert_close(out[0], together[row], rtol=1e-5, atol=1e-6)


def test_keys_and_values_go_to_their_slots_only() -> None:
    key_cache, value_cache = torch.zeros(3, 4, 2, 8), torch.zeros(3, 4, 2, 6)
    key, value = torch.randn(2, 2, 8), torch.randn(2, 2, 6)
    write_kv(key, value, key_cache, value_cache, torch.tensor([9, 2]))
    assert torch.equal(key_cache[2, 1], key[0])
    assert torch.equal(value_cache[0, 2], value[1])
    assert key_cache.count_nonzero() == key.numel()
    assert value_cache.count_nonzero() == value.numel()


@pytest.mark.parametrize(
    ("query_shape", "key_shape", "value_shape"),
    [
        ((1, 4, 8), (2, 4, 2, 16), (2, 4, 2, 8)),
        ((1, 4, 8), (2, 4, 3, 8), (2, 4, 3, 8)),
        ((1, 4, 8), (2, 4, 2, 8), (3, 4, 2, 8)),
        ((2, 4, 8), (2, 4, 2, 8), (2, 4, 2, 8)),
    ],
)
def test_shapes_that_do_not_fit_are_refused(
    query_shape: tuple[int, ...], key_shape: tuple[int, ...], value_shape: tuple[int, ...]
) -> None:
    metadata = AttentionMetadata(torch.tensor([[1]], dtype=torch.int32), (0, 1), (1,), torch.tensor([0]))
    with pytest.raises(ValueError):
        paged_attention(
            torch.zeros(query_shape),
            torch.zeros(key_shape),
            torch.zeros(value_shape),
            metadata,
            AttentionParams(scale=1.0),
        )

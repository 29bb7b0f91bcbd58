"""Paged attention on every machine level: right for every shape and mask, whatever the batch and the threads."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from model_worker.engine.ops.cpu.program import KernelLibrary, Program, Step, Team
from model_worker.engine.ops.paged_attention import AttentionParams
from model_worker.engine.ops.paged_attention.native_kv import KVFormat, NativeKVLayout
from model_worker.engine.ops.paged_attention.operation import PagedAttention, allocate_workspace

_WORKSPACE = allocate_workspace()


@pytest.fixture(scope="session", params=[1, 3])
def any_team(request: pytest.FixtureRequest, kernels: KernelLibrary) -> Team:
    return Team(kernels, request.param)


def _step(lengths: list[tuple[int, int]], block_size: int) -> tuple[Step, int]:
    """Sequences (tokens before, tokens in the batch) over shuffled blocks, and the number of blocks.

    Table entries past the end of a sequence are such that reading them would be noticed.
    """
    num_blocks = [-(-(before + new) // block_size) for before, new in lengths]
    total = sum(num_blocks) + 2
    free = torch.randperm(total).tolist()
    tables = torch.full((len(lengths), max(num_blocks) + 1), -(2**30), dtype=torch.int32)
    for row, num in enumerate(num_blocks):
        tables[row, :num] = torch.tensor([free.pop() for _ in range(num)])
    positions = torch.cat([torch.arange(before, before + new) for before, new in lengths])
    query_start = torch.tensor([0, *(new for _, new in lengths)]).cumsum(0)
    seq_lens = torch.tensor([before + new for before, new in lengths])
    return Step(
        torch.zeros_like(positions), positions, torch.zeros_like(positions)[None], tables[None], query_start, seq_lens
    ), total


def _fill(step: Step, layout: NativeKVLayout, num_blocks: int) -> Tensor:
    """A cache with random keys and values at all positions of the sequences, and NaN in all other slots."""
    blocks = layout.allocate(num_blocks)
    if layout.format is not KVFormat.INT8:
        num_slots = num_blocks * layout.block_size
        spoilt = torch.full((num_slots, layout.num_kv_heads, layout.key_dim + layout.value_dim), math.nan)
        layout.scatter(blocks, torch.arange(num_slots), *spoilt.split([layout.key_dim, layout.value_dim], dim=-1))
    for table, length in zip(step.block_tables[0], step.seq_lens.tolist(), strict=True):
        positions = torch.arange(length)
        slots = table[positions // layout.block_size].long() * layout.block_size + positions % layout.block_size
        keys = torch.randn(length, layout.num_kv_heads, layout.key_dim)
        values = torch.randn(length, layout.num_kv_heads, layout.value_dim)
        layout.scatter(blocks, slots, keys, values)
    return blocks


def _operation(
    step: Step, layout: NativeKVLayout, num_blocks: int, num_heads: int, params: AttentionParams
) -> PagedAttention:
    """With random contents, and columns that are not its own around query and out."""
    num_rows, width = step.num_rows, num_heads * layout.key_dim
    query = torch.randn(num_rows + 1, width + 5)[:num_rows, 3 : 3 + width]
    out = torch.full((num_rows + 1, num_heads * layout.value_dim + 2), 7.0)[:num_rows, 1:-1]
    blocks = _fill(step, layout, num_blocks)
    return PagedAttention("attention", query, blocks, layout, params, out, _WORKSPACE)


def _run(team: Team, operation: PagedAttention, step: Step) -> Tensor:
    Program(team, [operation]).run(step)
    return operation.out.clone()


def _check(team: Team, operation: PagedAttention, step: Step) -> None:
    out = _run(team, operation, step)
    operation.out.zero_()
    operation.reference(step)
    torch.testing.assert_close(out, operation.out, rtol=2e-5, atol=2e-5)


_DECODE = st.tuples(st.integers(0, 150), st.just(1))
_PROMPT = st.tuples(st.just(0), st.integers(2, 60))
_CHUNK = st.tuples(st.integers(1, 90), st.integers(2, 40))
_LONG = st.tuples(st.integers(200, 700), st.integers(1, 5))


@st.composite
def _batches(draw: st.DrawFn) -> list[tuple[int, int]]:
    kinds = draw(st.sampled_from([_DECODE, _PROMPT, _CHUNK, _LONG, st.one_of(_DECODE, _PROMPT, _CHUNK, _LONG)]))
    return draw(st.lists(kinds, min_size=1, max_size=9))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    lengths=_batches(),
    block_size=st.sampled_from([1, 4, 16, 16, 24, 32, 48]),
    heads=st.sampled_from([(2, 2), (6, 2), (8, 2), (8, 1), (14, 2), (100, 1)]),
    dims=st.sampled_from([(16, 16), (64, 64), (80, 80), (24, 40), (7, 5), (33, 20)]),
    window=st.sampled_from([None, None, 1, 7, 33, 300]),
    chunk=st.sampled_from([None, None, 5, 32, 256]),
    softcap=st.sampled_from([None, 3.0]),
    with_sinks=st.booleans(),
    format=st.sampled_from(list(KVFormat)),
    seed=st.integers(0, 2**16),
)
def test_every_option(
    any_team: Team,
    lengths: list[tuple[int, int]],
    block_size: int,
    heads: tuple[int, int],
    dims: tuple[int, int],
    window: int | None,
    chunk: int | None,
    softcap: float | None,
    with_sinks: bool,
    format: KVFormat,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    step, num_blocks = _step(lengths, block_size)
    layout = NativeKVLayout(block_size, heads[1], *dims, format)
    params = AttentionParams(0.3, window, chunk, softcap, torch.randn(heads[0]) if with_sinks else None)
    _check(any_team, _operation(step, layout, num_blocks, heads[0], params), step)


@pytest.mark.parametrize("lengths", [[(77, 1)] * 5 + [(600, 1)], [(0, 70)], [(40, 30), (90, 1), (0, 5)]])
@pytest.mark.parametrize("block_size", [16, 32])
@pytest.mark.parametrize("dims", [16, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("ratio", [1, 3, 4, 8])
def test_shapes_of_models(team: Team, lengths: list[tuple[int, int]], block_size: int, dims: int, ratio: int) -> None:
    torch.manual_seed(dims + ratio)
    step, num_blocks = _step(lengths, block_size)
    layout = NativeKVLayout(block_size, 2, dims, dims, KVFormat.BFLOAT16)
    _check(team, _operation(step, layout, num_blocks, 2 * ratio, AttentionParams(dims**-0.5)), step)

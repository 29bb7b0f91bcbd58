"""Paged attention on every machine level: right for every shape and mask, whatever the batch and the threads."""

from __future__ import annotations

import math
from dataclasses import replace

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


_NO_BLOCK = -(2**30)  # reading it would be noticed
_LAYER_GROUP = 1


def _step(lengths: list[tuple[int, int]], block_size: int) -> tuple[Step, int]:
    """Sequences (tokens before, tokens in the batch) over shuffled blocks, and the number of blocks.

    Table entries past the end of a sequence, and those of the other layer group, are no blocks.
    """
    num_blocks = [-(-(before + new) // block_size) for before, new in lengths]
    total = sum(num_blocks) + 2
    free = torch.randperm(total).tolist()
    tables = torch.full((2, len(lengths), max(num_blocks) + 1), _NO_BLOCK, dtype=torch.int32)
    for row, num in enumerate(num_blocks):
        tables[_LAYER_GROUP, row, :num] = torch.tensor([free.pop() for _ in range(num)])
    positions = torch.cat([torch.arange(before, before + new) for before, new in lengths])
    query_start = torch.tensor([0, *(new for _, new in lengths)]).cumsum(0)
    seq_lens = torch.tensor([before + new for before, new in lengths])
    slots = torch.zeros(2, len(positions), dtype=torch.int64)
    return Step(torch.zeros_like(positions), positions, slots, tables, query_start, seq_lens), total


def _alone(step: Step, sequence: int, num_tokens: int) -> Step:
    """The last tokens of one sequence as a step of their own."""
    length = int(step.seq_lens[sequence])
    return Step(
        torch.zeros(num_tokens, dtype=torch.int64),
        torch.arange(length - num_tokens, length),
        torch.zeros(2, num_tokens, dtype=torch.int64),
        step.block_tables[:, sequence : sequence + 1].clone(),
        torch.tensor([0, num_tokens]),
        torch.tensor([length]),
    )


def _fill(step: Step, layout: NativeKVLayout, num_blocks: int) -> Tensor:
    """A cache with random keys and values at all positions of the sequences, and NaN in all other slots."""
    blocks = layout.allocate(num_blocks)
    num_slots = num_blocks * layout.block_size
    spoilt = torch.full((num_slots, layout.num_kv_heads, layout.key_dim + layout.value_dim), math.nan)
    layout.scatter(blocks, torch.arange(num_slots), *spoilt.split([layout.key_dim, layout.value_dim], dim=-1))
    for sequence, length in enumerate(step.seq_lens.tolist()):
        keys = torch.randn(length, layout.num_kv_heads, layout.key_dim)
        values = torch.randn(length, layout.num_kv_heads, layout.value_dim)
        layout.scatter(blocks, _slots(step, layout, sequence), keys, values)
    return blocks


def _slots(step: Step, layout: NativeKVLayout, sequence: int) -> Tensor:
    positions = torch.arange(int(step.seq_lens[sequence]))
    table = step.block_tables[_LAYER_GROUP, sequence].long()
    return table[positions // layout.block_size] * layout.block_size + positions % layout.block_size


def _operation(
    step: Step, layout: NativeKVLayout, num_blocks: int, num_heads: int, params: AttentionParams
) -> PagedAttention:
    """With random contents, and columns that are not its own around query and out."""
    num_rows, width = step.num_rows, num_heads * layout.key_dim
    query = torch.randn(num_rows + 1, width + 5)[:num_rows, 3 : 3 + width]
    out = torch.full((num_rows + 1, num_heads * layout.value_dim + 2), 7.0)[:num_rows, 1:-1]
    blocks = _fill(step, layout, num_blocks)
    return PagedAttention("attention", query, blocks, layout, params, out, _WORKSPACE, _LAYER_GROUP)


def _with_rows(operation: PagedAttention, rows: slice) -> PagedAttention:
    """The same cache for other queries."""
    return replace(operation, query=operation.query[rows], out=torch.zeros_like(operation.out[rows]))


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
    operation = _operation(step, layout, num_blocks, heads[0], params)
    for table, (before, _) in zip(step.block_tables[_LAYER_GROUP], lengths, strict=True):
        table[: params.first_visible(before) // block_size] = _NO_BLOCK  # let go of, as nothing sees them any more
    _check(any_team, operation, step)


@pytest.mark.parametrize("lengths", [[(77, 1)] * 5 + [(600, 1)], [(0, 70)], [(40, 30), (90, 1), (0, 5)]])
@pytest.mark.parametrize("block_size", [16, 32])
@pytest.mark.parametrize("dims", [16, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("ratio", [1, 3, 4, 8])
def test_shapes_of_models(team: Team, lengths: list[tuple[int, int]], block_size: int, dims: int, ratio: int) -> None:
    torch.manual_seed(dims + ratio)
    step, num_blocks = _step(lengths, block_size)
    layout = NativeKVLayout(block_size, 2, dims, dims, KVFormat.BFLOAT16)
    _check(team, _operation(step, layout, num_blocks, 2 * ratio, AttentionParams(dims**-0.5)), step)


_MIXED = [(700, 1), (31, 1), (0, 90), (300, 40), (0, 1)]


@pytest.mark.parametrize("format", list(KVFormat))
@pytest.mark.parametrize("block_size", [4, 16])
def test_a_row_has_the_same_bits_in_every_batch(kernels: KernelLibrary, format: KVFormat, block_size: int) -> None:
    torch.manual_seed(2)
    step, num_blocks = _step(_MIXED, block_size)
    layout = NativeKVLayout(block_size, 2, 48, 48, format)
    params = AttentionParams(0.2, sliding_window=500, sinks=torch.randn(6))
    operation = _operation(step, layout, num_blocks, 6, params)
    one, three = Team(kernels, 1), Team(kernels, 3)
    together = _run(three, operation, step)
    assert torch.equal(_run(one, operation, step), together)
    for sequence, (_, num_tokens) in enumerate(_MIXED):
        end = int(step.query_start[sequence + 1])
        for num in {1, min(7, num_tokens), num_tokens}:
            alone = _with_rows(operation, slice(end - num, end))
            for team in (one, three):
                assert torch.equal(_run(team, alone, _alone(step, sequence, num)), together[end - num : end])


def test_a_long_context_is_cut_only_where_the_workspace_holds_the_parts(kernels: KernelLibrary) -> None:
    torch.manual_seed(3)
    step, num_blocks = _step([(2000, 3)], 16)
    layout = NativeKVLayout(16, 2, 32, 32, KVFormat.FLOAT32)
    operation = _operation(step, layout, num_blocks, 4, AttentionParams(0.2))
    team = Team(kernels, 3)
    cut = _run(team, operation, step)
    for num_floats in (32, 1000):
        small = torch.zeros(num_floats)
        assert torch.equal(_run(team, replace(operation, workspace=small), step), cut)
        assert small.count_nonzero() == 0


@pytest.mark.parametrize("format", list(KVFormat))
def test_nan_stays_in_its_sequence_and_is_seen_there(team: Team, format: KVFormat) -> None:
    torch.manual_seed(4)
    step, num_blocks = _step([(70, 1), (300, 1), (0, 20)], 16)
    layout = NativeKVLayout(16, 2, 16, 16, format)
    operation = _operation(step, layout, num_blocks, 4, AttentionParams(0.2))
    sound = _run(team, operation, step)
    slots = _slots(step, layout, 1)[200:264]  # more than what is looked at together
    layout.scatter(operation.blocks, slots, torch.full((64, 2, 16), math.nan), torch.zeros(64, 2, 16))
    operation.query[5] = math.nan
    out = _run(team, operation, step)
    spoilt = out.isnan().all(dim=1)
    assert spoilt.nonzero().flatten().tolist() == [1, 5]
    assert torch.equal(out[~spoilt], sound[~spoilt])


def test_cost() -> None:
    step, num_blocks = _step([(99, 1), (0, 10)], 16)
    layout = NativeKVLayout(16, 2, 8, 8, KVFormat.BFLOAT16)
    operation = _operation(step, layout, num_blocks, 4, AttentionParams(0.2))
    assert operation.flops(step) == 2 * 4 * (8 + 8) * (100 + 55)
    assert operation.bytes_moved(step) == 110 * 2 * (8 + 8) * 2 + 2 * 11 * 4 * 8 * 4
    windowed = replace(operation, params=AttentionParams(0.2, sliding_window=4))
    assert windowed.flops(step) == 2 * 4 * (8 + 8) * (4 + 1 + 2 + 3 + 7 * 4)
    assert windowed.bytes_moved(step) == 14 * 2 * (8 + 8) * 2 + 2 * 11 * 4 * 8 * 4

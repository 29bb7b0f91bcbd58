"""Rotary embedding and KV writing on every machine level."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from model_worker.engine.ops.cpu.program import Program, Step, Team
from model_worker.engine.ops.paged_attention.native_kv import KVFormat, NativeKVLayout
from model_worker.engine.ops.rotary import RotaryKV, RotaryTable

_TOLERANCE = {  # of rotated keys: they may differ in the last place, and then be rounded to the other neighbour
    KVFormat.FLOAT32: 1e-6,
    KVFormat.BFLOAT16: 2**-7,
    KVFormat.FLOAT16: 2**-10,
    KVFormat.INT8: 1e-6,
    KVFormat.FLOAT8: 2**-3,
}
_LAYER_GROUP = 1


def _step(positions: Tensor, slots: Tensor) -> Step:
    none = torch.empty(0, dtype=torch.int64)
    slot_mapping = torch.stack([torch.full_like(slots, -(2**40)), slots])
    return Step(
        torch.zeros_like(positions), positions, slot_mapping, torch.empty(2, 0, 0, dtype=torch.int32), none, none
    )


@pytest.mark.parametrize("scaling", [1.0, 1.19])
def test_angles_of_far_positions(team: Team, scaling: float) -> None:
    frequencies = 1.0 / 10000.0 ** (torch.arange(0, 64, 2).float() / 64)
    positions = torch.cat([torch.arange(300), torch.arange(131072 - 50, 131073), torch.randint(131072, (2000,))])
    table = RotaryTable.allocate("rotary", frequencies, scaling, len(positions) + 1)
    step = _step(positions, positions)
    Program(team, [table]).run(step)
    cos, sin = table.cos.clone(), table.sin.clone()
    table.reference(step)
    torch.testing.assert_close(cos, table.cos, rtol=0, atol=1e-6)
    torch.testing.assert_close(sin, table.sin, rtol=0, atol=1e-6)
    assert table.cos[-1].count_nonzero() == 0


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    num_rows=st.sampled_from([0, 1, 3, 17, 40]),
    block_size=st.sampled_from([1, 4, 16, 32]),
    heads=st.sampled_from([(2, 2), (6, 2), (8, 1)]),
    dims=st.sampled_from([(16, 16), (64, 64), (24, 40), (8, 5)]),
    rotated=st.sampled_from([None, 2, 6, 8, 12, 16, 20, 32, 64]),
    format=st.sampled_from(list(KVFormat)),
    seed=st.integers(0, 2**16),
)
def test_every_option(
    team: Team,
    num_rows: int,
    block_size: int,
    heads: tuple[int, int],
    dims: tuple[int, int],
    rotated: int | None,
    format: KVFormat,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    layout = NativeKVLayout(block_size, heads[1], *dims, format)
    slots = torch.randperm(7 * block_size + num_rows)[:num_rows]
    step = _step(torch.randint(10000, (num_rows,)), slots)
    widths = [heads[0] * dims[0], heads[1] * dims[0], heads[1] * dims[1]]
    qkv = torch.randn(num_rows + 1, sum(widths) + 1)
    query, key, value, _ = qkv.split([*widths, 1], dim=1)
    table = None
    if rotated is not None and rotated <= dims[0]:
        table = RotaryTable.allocate("table", torch.rand(rotated // 2), 1.0, num_rows)
        table.reference(step)
    before = qkv.clone()
    blocks = layout.allocate(7 + num_rows)
    operation = RotaryKV("rotary", query, key, value, table, blocks, layout, _LAYER_GROUP)
    Program(team, [operation]).run(step)
    out, written = qkv.clone(), blocks.clone()
    qkv.copy_(before)
    blocks.zero_()
    operation.reference(step)
    torch.testing.assert_close(out, qkv, rtol=1e-6, atol=1e-6)
    every_block = torch.arange(len(blocks))
    length = len(blocks) * block_size
    got, expected = (layout.gather(cache, every_block, length) for cache in (written, blocks))
    for a, b in zip(got, expected, strict=True):
        step_size = b.abs().amax(dim=-1, keepdim=True) / 127 if format is KVFormat.INT8 else torch.tensor(1e-6)
        assert ((a - b).abs() <= b.abs() * _TOLERANCE[format] + step_size * 1.01).all()


@pytest.mark.parametrize("format", list(KVFormat))
def test_numbers_are_rounded_as_torch_does(team: Team, format: KVFormat) -> None:
    """Of all sizes, with ties, subnormal results, overflow, infinities and NaN."""
    torch.manual_seed(1)
    layout = NativeKVLayout(16, 1, 64, 64, format)
    num_rows = 400
    qkv = torch.randn(num_rows, 192) * 2.0 ** torch.randint(-30, 25, (num_rows, 1))
    qkv[::2] *= 2.0 ** torch.randint(-12, 1, (200, 192))
    qkv[1::4] = qkv[1::4].half().float() * (1 + 2.0**-11)
    qkv[3::4] = qkv[3::4].bfloat16().float() * (1 + 2.0**-8)
    qkv[7, 70], qkv[8, 71], qkv[9, 130] = torch.nan, torch.inf, -torch.inf
    qkv[10] = 0.0
    query, key, value = qkv.split(64, dim=1)
    blocks = layout.allocate(num_rows // 16)
    operation = RotaryKV("rotary", query, key, value, None, blocks, layout, _LAYER_GROUP)
    step = _step(torch.arange(num_rows), torch.arange(num_rows))
    Program(team, [operation]).run(step)
    written = blocks.clone()
    operation.reference(step)
    every_block = torch.arange(len(blocks))
    got, expected = (layout.gather(cache, every_block, num_rows) for cache in (written, blocks))
    for a, b in zip(got, expected, strict=True):
        finite = b.isfinite().all(dim=-1)
        assert torch.equal(a.isfinite().all(dim=-1), finite)
        assert torch.equal(a[finite], b[finite])

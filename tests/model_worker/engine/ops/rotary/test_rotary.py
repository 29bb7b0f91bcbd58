"""Rotary embedding and KV writing on every machine level."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings, strategies as st

from model_worker.engine.ops.cpu.program import Program, Step, Team
from model_worker.engine.ops.paged_attention.native_kv import KVFormat, NativeKVLayout
from model_worker.engine.ops.rotary import RotaryKV, RotaryTable


def _step(positions: torch.Tensor, slots: torch.Tensor) -> Step:
    none = torch.empty(0, dtype=torch.int64)
    return Step(
        torch.zeros_like(positions), positions, slots[None], torch.empty(1, 0, 0, dtype=torch.int32), none, none
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
    operation = RotaryKV("rotary", query, key, value, table, blocks, layout)
    Program(team, [operation]).run(step)
    out, written = qkv.clone(), blocks.clone()
    qkv.copy_(before)
    blocks.zero_()
    operation.reference(step)
    torch.testing.assert_close(out, qkv, rtol=1e-6, atol=1e-6)
    every_block = torch.arange(len(blocks))
    length = len(blocks) * block_size
    for got, expected in zip(
        layout.gather(written, every_block, length), layout.gather(blocks, every_block, length), strict=True
    ):
        # Rotated keys may differ in the last place and then be rounded to the other neighbour.
        tolerance = {
            torch.float32: 1e-6,
            torch.bfloat16: 2**-8,
            torch.float16: 2**-10,
            torch.int8: 0,
            torch.float8_e4m3fn: 2**-3,
        }
        torch.testing.assert_close(
            got,
            expected,
            rtol=tolerance[format.dtype],
            atol=expected.abs().max().item() / 127 if format is KVFormat.INT8 and len(slots) else 1e-6,
        )

"""The cache of the CPU kernels: tokens come back from their slots as exactly as the format can hold them."""

from __future__ import annotations

import pytest
import torch

from model_worker.engine.ops.paged_attention.native_kv import KVFormat, NativeKVLayout

_RELATIVE = {KVFormat.FLOAT32: 0.0, KVFormat.BFLOAT16: 2**-8, KVFormat.FLOAT16: 2**-11, KVFormat.FLOAT8: 2**-4}


@pytest.mark.parametrize("format", list(KVFormat))
@pytest.mark.parametrize(("block_size", "value_dim"), [(1, 5), (4, 24), (16, 64), (32, 40)])
def test_tokens_come_back_from_their_slots(format: KVFormat, block_size: int, value_dim: int) -> None:
    torch.manual_seed(0)
    layout = NativeKVLayout(block_size, 3, 24, value_dim, format)
    blocks = layout.allocate(40)
    length = 37
    table = torch.randperm(40)[: -(-length // block_size)].int()
    positions = torch.arange(length)
    slots = table[positions // block_size].long() * block_size + positions % block_size
    keys, values = torch.randn(length, 3, 24), 100.0 * torch.randn(length, 3, value_dim)
    shuffled = torch.randperm(length)
    layout.scatter(blocks, slots[shuffled], keys[shuffled], values[shuffled])
    for got, given in zip(layout.gather(blocks, table, length), (keys, values), strict=True):
        peaks = given.abs().amax(dim=-1, keepdim=True)
        if format is KVFormat.INT8:
            assert ((got - given).abs() <= peaks / 253).all()
        else:
            smallest = peaks * 2**-18 if format is KVFormat.FLOAT8 else 0.0
            assert ((got - given).abs() <= given.abs() * _RELATIVE[format] + smallest).all()


@pytest.mark.parametrize("format", list(KVFormat))
def test_blocks_move_as_a_whole(format: KVFormat) -> None:
    layout = NativeKVLayout(16, 2, 8, 8, format)
    blocks = layout.allocate(4)
    assert blocks.shape == (4, layout.block_bytes)
    assert blocks.data_ptr() % 64 == 0
    layout.scatter(blocks, torch.arange(16, 32), torch.randn(16, 2, 8), torch.randn(16, 2, 8))
    assert not blocks[[0, 2, 3]].any()
    blocks[3] = blocks[1]
    first, copied = (layout.gather(blocks, torch.tensor([block]), 16) for block in (1, 3))
    assert all(torch.equal(a, b) for a, b in zip(first, copied, strict=True))
    blocks[1] = 0
    assert not any(part.any() for part in layout.gather(blocks, torch.tensor([1]), 16))


@pytest.mark.parametrize("format", [KVFormat.INT8, KVFormat.FLOAT8])
def test_what_is_not_finite_or_too_small_shows(format: KVFormat) -> None:
    layout = NativeKVLayout(4, 1, 8, 8, format)
    blocks = layout.allocate(1)
    keys = torch.ones(4, 1, 8)
    keys[0, 0, 3], keys[1, 0, 3], keys[2] = torch.nan, torch.inf, 1e-38
    layout.scatter(blocks, torch.arange(4), keys, keys)
    got, _ = layout.gather(blocks, torch.tensor([0]), 4)
    assert not got[0].isfinite().any()
    assert not got[1].isfinite().all()
    assert not got[2].any()
    assert torch.equal(got[3], keys[3])


def test_a_layer_takes_what_its_tokens_need() -> None:
    assert NativeKVLayout(16, 3, 64, 64, KVFormat.BFLOAT16).block_bytes == 16 * 3 * (64 + 64) * 2
    assert NativeKVLayout(16, 3, 64, 64, KVFormat.INT8).block_bytes == 16 * 3 * (64 + 64 + 8)
    assert NativeKVLayout(16, 3, 64, 64, KVFormat.INT8).token_bytes == 3 * (64 + 64 + 8)

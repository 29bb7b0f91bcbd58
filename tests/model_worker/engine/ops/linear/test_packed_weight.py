"""Packing loses no bit, and puts every value where the layout's drawing says."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings, strategies as st

from compression.grouped_weight import GroupedWeight
from model_worker.engine.ops.linear import interleave_gated, pack
from model_worker.engine.ops.linear.packed_weight import PANEL

_BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def _random_bits(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Any pattern but NaN, whose payload a conversion may change."""
    bits = torch.iinfo(_BITS[dtype])
    random = torch.randint(bits.min, bits.max + 1, shape, dtype=torch.int64).to(_BITS[dtype]).view(dtype)
    return random.where(~random.isnan(), torch.zeros((), dtype=dtype))


def _grouped(num_outputs: int, num_groups: int, *, is_int4: bool) -> GroupedWeight:
    low, high = (0, 16) if is_int4 else (-128, 128)
    values = torch.randint(low, high, (num_outputs, 32 * num_groups), dtype=torch.int8)
    scales = _random_bits(torch.float16, num_outputs, num_groups).nan_to_num()
    return GroupedWeight(values, scales, _random_bits(torch.float16, *scales.shape).nan_to_num() if is_int4 else None)


@settings(max_examples=60, deadline=None)
@given(
    dtype=st.sampled_from(list(_BITS)),
    num_outputs=st.integers(1, 100),
    num_inputs=st.integers(1, 70),
    seed=st.integers(0, 10**6),
)
def test_values_survive_packing(dtype: torch.dtype, num_outputs: int, num_inputs: int, seed: int) -> None:
    torch.manual_seed(seed)
    weight = _random_bits(dtype, num_outputs, num_inputs)
    packed = pack(weight)
    assert torch.equal(packed.unpack().view(torch.int32), weight.float().view(torch.int32))
    assert packed.num_bytes == -(-num_outputs // PANEL) * PANEL * num_inputs * dtype.itemsize


@settings(max_examples=60, deadline=None)
@given(
    num_outputs=st.integers(1, 100),
    num_groups=st.integers(1, 5),
    is_int4=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_blocks_survive_packing(num_outputs: int, num_groups: int, is_int4: bool, seed: int) -> None:
    torch.manual_seed(seed)
    weight = _grouped(num_outputs, num_groups, is_int4=is_int4)
    packed = pack(weight)
    assert torch.equal(packed.unpack(), weight.dequantize())
    assert packed.num_bytes == -(-num_outputs // PANEL) * num_groups * (64 + 64 * is_int4 + 1024 // (1 + is_int4))


def test_dense_layout() -> None:
    weight = torch.arange(70.0 * 3).view(70, 3)
    data = pack(weight).data.view(torch.float32).view(3, 3, PANEL)  # [panel][k][32]
    assert data[1, 2, 5] == weight[32 + 5, 2]
    assert (data[2, :, 70 - 64 :] == 0).all()


@pytest.mark.parametrize(("k", "quad", "lane"), [(0, 0, 0), (7, 1, 3), (17, 4, 1), (31, 7, 3)])
def test_int8_layout(k: int, quad: int, lane: int) -> None:
    weight = _grouped(64, 2, is_int4=False)
    data = pack(weight).data.view(2, 2, 64 + 1024)  # [panel][group]{ scale[32], values[8][32][4] }
    assert data[1, 1, :64].view(torch.float16).view(torch.int16)[9] == weight.scales[32 + 9, 1].view(torch.int16)
    assert data[1, 1, 64:].view(8, PANEL, 4)[quad, 9, lane] == weight.values[32 + 9, 32 + k].int() + 128


@pytest.mark.parametrize(("k", "quad", "lane", "shift"), [(0, 0, 0, 0), (15, 3, 3, 0), (16, 0, 0, 4), (22, 1, 2, 4)])
def test_int4_layout(k: int, quad: int, lane: int, shift: int) -> None:
    weight = _grouped(64, 2, is_int4=True)
    assert weight.minimums is not None
    data = pack(weight).data.view(2, 2, 128 + 512)  # [panel][group]{ scale[32], minimum[32], values[4][32][4] }
    halves = data[1, 1, :128].view(torch.float16).view(torch.int16)
    assert halves[9] == weight.scales[32 + 9, 1].view(torch.int16)
    assert halves[32 + 9] == weight.minimums[32 + 9, 1].view(torch.int16)
    assert data[1, 1, 128:].view(4, PANEL, 4)[quad, 9, lane].int() >> shift & 15 == weight.values[32 + 9, 32 + k]


def test_a_gated_pair_is_interleaved_by_half_panels() -> None:
    gate, up = torch.arange(20.0)[:, None] + 1, torch.arange(20.0)[:, None] + 101
    both = interleave_gated(gate, up)[:, 0].view(2, 2, 16)
    assert both[0, 0].tolist() == [*range(1, 17)]
    assert both[0, 1].tolist() == [*range(101, 117)]
    assert both[1, 0].tolist() == [17, 18, 19, 20] + [0] * 12
    assert both[1, 1].tolist() == [117, 118, 119, 120] + [0] * 12

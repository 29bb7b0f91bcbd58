"""Packing for GPUs loses nothing, and puts numbers where the document says."""

from __future__ import annotations

import pytest
import torch

from compression.grouped_weight import GROUP, GroupedWeight
from compression.int4 import quantize_int4
from compression.int8 import quantize_int8
from model_worker.engine.ops.quantized_matmul.functional import pack_groups, unpack_groups


def _same(found: GroupedWeight, expected: GroupedWeight) -> None:
    assert torch.equal(found.values, expected.values)
    assert found.values.dtype == torch.int8
    assert torch.equal(found.scales, expected.scales)
    if expected.minimums is None:
        assert found.minimums is None
    else:
        assert found.minimums is not None
        assert torch.equal(found.minimums, expected.minimums)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("num_outputs", "num_inputs"), [(1, 32), (3, 96), (16, 256), (5, 576), (2, 1024)])
def test_unpacking_gives_it_back(num_outputs: int, num_inputs: int, bits: int) -> None:
    torch.manual_seed(0)
    weight = (quantize_int4 if bits == 4 else quantize_int8)(torch.randn(num_outputs, num_inputs))
    packed = pack_groups(weight)
    assert packed.bits == bits
    assert (packed.num_outputs, packed.num_inputs) == (num_outputs, num_inputs)
    _same(unpack_groups(packed), weight)
    assert torch.equal(packed.dequantize(), weight.dequantize())
    again = pack_groups(weight)
    assert torch.equal(again.words, packed.words)
    assert torch.equal(again.grids, packed.grids)


@pytest.mark.parametrize("bits", [4, 8])
def test_every_number_there_is(bits: int) -> None:
    values = torch.arange(256, dtype=torch.int32).sub(128).to(torch.int8) if bits == 8 else torch.arange(256) % 16
    scales = torch.linspace(-2, 2, 8).half()[None]
    weight = GroupedWeight(values.to(torch.int8)[None], scales, None if bits == 8 else scales.flip(1))
    _same(unpack_groups(pack_groups(weight)), weight)


@pytest.mark.parametrize("bits", [4, 8])
def test_each_number_is_where_the_docstring_says(bits: int) -> None:
    values = torch.zeros(2, 3 * GROUP, dtype=torch.int8)
    group, place, word = 1, 32 // bits - 1, 3
    values[1, group * 32 + place * bits + word] = 7
    ones = torch.ones(2, 3).half()
    packed = pack_groups(GroupedWeight(values, ones, None if bits == 8 else ones))
    assert packed.words.shape == (2, 3, bits)
    field = (int(packed.words[1, group, word].item()) >> place * bits) & (2**bits - 1)
    assert field == (7 if bits == 4 else 135)
    assert packed.grids.shape == ((2, 3) if bits == 8 else (2, 3, 2))
    assert packed.num_bytes == 2 * 3 * GROUP * bits // 8 + packed.grids.nbytes

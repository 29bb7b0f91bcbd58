"""8-bit weights: within half a step, on GGUF's own grid, and nothing quantized that the format cannot hold."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch

from compression.grouped_weight import GROUP, can_quantize
from compression.int8 import quantize_int8
from registry.errors import CheckpointError, UnsupportedModelError


def _weights(spread: float = 0.05) -> torch.Tensor:
    return torch.randn(70, 320, generator=torch.Generator().manual_seed(0)) * spread


@pytest.mark.parametrize("spread", [1e-7, 3e-6, 1e-3, 0.05, 1.0, 1e5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_every_weight_is_within_half_a_step(spread: float, dtype: torch.dtype) -> None:
    weight = _weights(spread).to(dtype)
    quantized = quantize_int8(weight)
    assert quantized.values.shape == quantized.shape == weight.shape
    assert (quantized.values.dtype, quantized.scales.dtype) == (torch.int8, torch.float16)
    assert quantized.minimums is None
    step = quantized.scales.float().repeat_interleave(GROUP, dim=1)
    assert bool(((quantized.dequantize() - weight.float()).abs() <= 0.5001 * step).all())


def test_the_step_is_a_127th_of_the_largest_weight() -> None:
    weight = _weights()
    peaks = weight.view(70, -1, GROUP).abs().amax(dim=2)
    assert torch.equal(quantize_int8(weight).scales, (peaks / 127).half())


def test_what_gguf_quantized_comes_back_bit_for_bit() -> None:
    blocks = gguf.quants.quantize(_weights().numpy(), gguf.GGMLQuantizationType.Q8_0)
    weight = torch.from_numpy(gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType.Q8_0))
    assert torch.equal(quantize_int8(weight).dequantize(), weight)


def test_quantizing_twice_changes_nothing() -> None:
    once = quantize_int8(_weights())
    twice = quantize_int8(once.dequantize())
    assert torch.equal(once.values, twice.values)
    assert torch.equal(once.scales, twice.scales)


def test_groups_of_zeros_and_of_one_number() -> None:
    weight = torch.cat([torch.zeros(1, 32), torch.full((1, 32), -0.25), torch.eye(1, 32) * 3.0])
    quantized = quantize_int8(weight)
    assert quantized.scales[0].item() == 0.0
    assert quantized.values[1].unique().tolist() == [-127]
    assert torch.allclose(quantized.dequantize(), weight, rtol=1e-3)
    assert bool((quantized.dequantize()[2, 1:] == 0).all())


def test_a_group_does_not_know_its_neighbours() -> None:
    weight = _weights()
    changed = weight.clone()
    changed[3, 32:64] = 1000.0
    before, after = quantize_int8(weight).dequantize(), quantize_int8(changed).dequantize()
    after[3, 32:64] = before[3, 32:64]
    assert torch.equal(before, after)


def test_more_groups_than_are_worked_on_at_a_time_and_a_transposed_weight() -> None:
    weight = torch.randn(512, 400, generator=torch.Generator().manual_seed(1)).t()  # [400, 512]: 6,400 groups
    whole = quantize_int8(weight)
    rows = [quantize_int8(weight[start : start + 100]) for start in range(0, 400, 100)]
    assert torch.equal(whole.values, torch.cat([part.values for part in rows]))
    assert torch.equal(whole.scales, torch.cat([part.scales for part in rows]))


@pytest.mark.parametrize(
    ("shape", "possible"),
    [((4, 64), True), ((1, 32), True), ((64, 4), False), ((32,), False), ((2, 4, 64), False), ((4, 0), False)],
)
def test_which_shapes_can_be_quantized(shape: tuple[int, ...], possible: bool) -> None:
    assert can_quantize(shape) is possible
    if not possible:
        with pytest.raises(UnsupportedModelError, match="multiple of 32"):
            quantize_int8(torch.zeros(shape))


@pytest.mark.parametrize("value", [float("inf"), float("nan"), float("-inf")])
@pytest.mark.parametrize("row", [7, 399])  # among the first groups that are worked on at a time, and among the last
def test_numbers_that_are_none_are_refused(value: float, row: int) -> None:
    weight = torch.zeros(400, 320)
    weight[row, 9] = value
    with pytest.raises(CheckpointError, match="infinite values or NaN"):
        quantize_int8(weight)


def test_a_scale_beyond_float16_is_refused() -> None:
    largest = 65504.0 * 127
    assert quantize_int8(torch.full((1, 32), largest)).dequantize()[0, 0].item() == largest
    with pytest.raises(UnsupportedModelError, match="float16 cannot hold"):
        quantize_int8(torch.full((1, 32), 65536.0 * 127))


def test_rows_put_into_another_order() -> None:
    quantized = quantize_int8(_weights())
    order = np.random.default_rng(0).permutation(70)
    moved = quantized.map_rows(lambda rows: rows[order])
    assert torch.equal(moved.dequantize(), quantized.dequantize()[order])
    assert moved.minimums is None


def test_everything_is_where_the_weight_is() -> None:
    weight = torch.randn(70, 320)
    expected = quantize_int8(weight)
    with torch.device("meta"):  # where tensors are made of which nothing else is said
        found = quantize_int8(weight)
    assert torch.equal(found.values, expected.values)
    assert torch.equal(found.dequantize(), expected.dequantize())

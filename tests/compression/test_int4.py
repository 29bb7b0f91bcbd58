"""4-bit weights: never worse than the grid between a group's extremes, and exact where they were on a grid before."""

from __future__ import annotations

import gguf
import pytest
import torch

from compression.grouped_weight import GROUP
from compression.int4 import quantize_int4
from registry.errors import CheckpointError, UnsupportedModelError


def _weights(spread: float = 0.05, offset: float = 0.0) -> torch.Tensor:
    return torch.randn(70, 320, generator=torch.Generator().manual_seed(0)) * spread + offset


def _squared_error(weight: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Of each group."""
    return (weight.double() - other.double()).square().view(-1, GROUP).sum(dim=1)


def _plain_grid(weight: torch.Tensor) -> torch.Tensor:
    """The weight on the grid between the extremes of each group, scale and minimum in float16."""
    groups = weight.view(-1, GROUP)
    low, high = groups.aminmax(dim=1, keepdim=True)
    scale, minimum = ((high - low) / 15).half().float(), low.half().float()
    return (((groups - minimum) / scale).round().clamp(0, 15) * scale + minimum).view(weight.shape)


@pytest.mark.parametrize(("spread", "offset"), [(0.05, 0.0), (1.0, -3.0), (1e-4, 0.0), (1e4, 0.0), (0.01, 100.0)])
def test_no_group_is_worse_than_on_the_plain_grid(spread: float, offset: float) -> None:
    weight = _weights(spread, offset)
    quantized = quantize_int4(weight)
    assert quantized.minimums is not None
    assert quantized.values.dtype == torch.int8
    assert (quantized.scales.dtype, quantized.minimums.dtype) == (torch.float16, torch.float16)
    assert 0 <= quantized.values.min() <= quantized.values.max() <= 15
    ours, plain = (_squared_error(weight, other) for other in (quantized.dequantize(), _plain_grid(weight)))
    assert bool((ours <= plain * (1 + 1e-5)).all())


def test_the_error_is_a_sixth_less_than_on_the_plain_grid() -> None:
    weight = _weights()
    gain = (
        _squared_error(weight, quantize_int4(weight).dequantize()).sum()
        / _squared_error(weight, _plain_grid(weight)).sum()
    )
    assert gain < 0.84


def test_the_error_is_less_than_gguf_has() -> None:
    weight = _weights()
    blocks = gguf.quants.quantize(weight.numpy(), gguf.GGMLQuantizationType.Q4_1)
    theirs = torch.from_numpy(gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType.Q4_1))
    ours = quantize_int4(weight).dequantize()
    assert _squared_error(weight, ours).sum() < 0.85 * _squared_error(weight, theirs).sum()


def test_what_gguf_quantized_comes_back() -> None:
    blocks = gguf.quants.quantize(_weights().numpy(), gguf.GGMLQuantizationType.Q4_1)
    weight = torch.from_numpy(gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType.Q4_1))
    assert torch.equal(quantize_int4(weight).dequantize(), weight)


def test_quantizing_twice_changes_nothing() -> None:
    once = quantize_int4(_weights()).dequantize()
    assert torch.equal(quantize_int4(once).dequantize(), once)


def test_groups_of_zeros_and_of_one_number() -> None:
    weight = torch.cat([torch.zeros(1, 32), torch.full((1, 32), -0.25), torch.full((1, 32), 1000.0)])
    quantized = quantize_int4(weight)
    assert torch.equal(quantized.dequantize(), weight)
    assert bool((quantized.values == 0).all())


def test_two_numbers_in_a_group_are_exact() -> None:
    weight = torch.tensor([0.25, -1.625]).repeat(4, 16)  # 15 steps of 1/8
    assert torch.equal(quantize_int4(weight).dequantize(), weight)


def test_weights_that_float16_can_hardly_tell_apart() -> None:
    """Scales among the subnormals: the error stays below what a few of the smallest numbers add up to."""
    weight = _weights(1e-7)
    assert float((quantize_int4(weight).dequantize() - weight).abs().max()) <= 16 * 2**-24


def test_more_groups_than_are_worked_on_at_a_time_and_a_transposed_weight() -> None:
    weight = torch.randn(512, 400, generator=torch.Generator().manual_seed(1)).t()  # [400, 512]: 6,400 groups
    whole = quantize_int4(weight).dequantize()
    assert torch.equal(whole, torch.cat([quantize_int4(rows).dequantize() for rows in weight.split(100)]))


@pytest.mark.parametrize("shape", [(64, 4), (32,), (2, 4, 64)])
def test_shapes_that_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(UnsupportedModelError, match="multiple of 32"):
        quantize_int4(torch.zeros(shape))


def test_numbers_that_are_none_are_refused() -> None:
    with pytest.raises(CheckpointError, match="infinite values or NaN"):
        quantize_int4(torch.full((1, 32), float("nan")))


@pytest.mark.parametrize("ends", [(-70000.0, 0.0), (70000.0, 70001.0), (0.0, 1.1e6)])
def test_scales_and_minimums_beyond_float16_are_refused(ends: tuple[float, float]) -> None:
    with pytest.raises(UnsupportedModelError, match="float16 cannot hold"):
        quantize_int4(torch.tensor(ends).repeat(1, 16))


def test_rows_put_into_another_order() -> None:
    quantized = quantize_int4(_weights())
    assert torch.equal(quantized.map_rows(lambda rows: rows.flip(0)).dequantize(), quantized.dequantize().flip(0))


def test_everything_is_where_the_weight_is() -> None:
    weight = _weights()
    expected = quantize_int4(weight)
    with torch.device("meta"):  # where tensors are made of which nothing else is said
        found = quantize_int4(weight)
    assert torch.equal(found.values, expected.values)
    assert torch.equal(found.dequantize(), expected.dequantize())

"""A linear layer with a quantized weight computes with what the weight stands for."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from compression.int4 import quantize_int4
from compression.int8 import quantize_int8
from model_worker.engine.layers.linear import Linear
from model_worker.engine.layers.quantized_linear import QuantizedMethod
from model_worker.engine.ops.quantized_matmul.functional import (
    Float8Weight,
    QuantizedWeight,
    pack_groups,
    quantize_float8,
)

CPU = torch.device("cpu")


def _quantize(kind: str, weight: torch.Tensor) -> QuantizedWeight:
    if kind == "float8":
        return quantize_float8(weight)
    return pack_groups((quantize_int4 if kind == "int4" else quantize_int8)(weight))


@pytest.mark.parametrize("kind", ["int4", "int8", "float8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
def test_it_computes_with_the_dequantized_weight(kind: str, dtype: torch.dtype, bias: bool) -> None:
    torch.manual_seed(0)
    layer = Linear(96, 40, bias=bias, dtype=dtype, device=CPU)
    matrix = torch.randn(40, 96) * 0.1
    quantized = _quantize(kind, matrix)
    if layer.bias is not None:
        layer.bias.copy_(torch.randn(40))
    layer.method = QuantizedMethod(layer, quantized)
    assert layer.weight is None
    weight = layer.method.weight(layer)
    assert weight.dtype == dtype
    torch.testing.assert_close(weight.float(), matrix, rtol=0.2, atol=0.05)
    x = torch.randn(2, 5, 96).to(dtype)
    expected = F.linear(x.float(), quantized.dequantize(), None if layer.bias is None else layer.bias.float())
    assert torch.equal(layer(x), expected.to(dtype))


def test_many_rows_are_rounded_to_float8_too() -> None:
    torch.manual_seed(1)
    layer = Linear(64, 24, bias=False, dtype=torch.float32, device=CPU)
    quantized = quantize_float8(torch.randn(24, 64))
    layer.method = QuantizedMethod(layer, quantized)
    x = torch.randn(65, 64)
    rounded = quantize_float8(x)
    assert isinstance(rounded, Float8Weight)
    torch.testing.assert_close(layer(x), rounded.dequantize() @ quantized.dequantize().T)
    torch.testing.assert_close(layer(x[:64]), x[:64] @ quantized.dequantize().T)
    torch.testing.assert_close(layer(x), layer(x.clone()), rtol=0, atol=0)


def test_rows_of_zeros_stay_zeros() -> None:
    matrix = torch.zeros(3, 32)
    matrix[1] = torch.arange(32)
    weight = quantize_float8(matrix)
    assert not weight.dequantize()[[0, 2]].any()
    assert weight.dequantize()[1, 31].item() == pytest.approx(31)
    assert weight.num_bytes == 3 * 32 + 3 * 4

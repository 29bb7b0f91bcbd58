"""The products as their formulas say, in torch."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from model_worker.engine.ops.quantized_matmul.float8_weight import Float8Weight, quantize_float8
from model_worker.engine.ops.quantized_matmul.packed_groups import PackedGroups


def grouped_matmul_reference(x: Tensor, weight: PackedGroups, bias: Tensor | None) -> Tensor:
    """x [T, K] -> [T, N]"""
    return _linear(x.float(), weight.dequantize(), bias).to(x.dtype)


def float8_matmul_reference(x: Tensor, weight: Float8Weight, bias: Tensor | None, *, exact_inputs: bool) -> Tensor:
    """x [T, K] -> [T, N]"""
    rows = x.float() if exact_inputs else quantize_float8(x).dequantize()
    return _linear(rows, weight.dequantize(), bias).to(x.dtype)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight, None if bias is None else bias.float())

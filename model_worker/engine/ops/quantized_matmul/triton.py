"""Launches the kernels for GPUs."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from compression.grouped_weight import GROUP
from model_worker.engine.ops.quantized_matmul.float8_weight import FLOAT8, SMALLEST_SCALE, Float8Weight
from model_worker.engine.ops.quantized_matmul.packed_groups import PackedGroups
from model_worker.engine.ops.quantized_matmul.tiles import Tile
from model_worker.engine.ops.quantized_matmul.triton_kernels import (
    float8_row_kernel,
    float8_rows_kernel,
    grouped_row_kernel,
    grouped_rows_kernel,
    quantize_rows_kernel,
)

_PRODUCT_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_QUANTIZED_BLOCK = 4096
_QUAD_BITS = 128
_EXPONENT_OF_ONE, _MANTISSA_BITS = 127, 23  # of float32
_SCALED_MM_MULTIPLE = 16  # of both sizes of the weight


def grouped_matmul(x: Tensor, weight: PackedGroups, bias: Tensor | None, tile: Tile) -> Tensor:
    """x [T, K] -> y [T, N]"""
    num_rows, num_outputs = len(x), weight.num_outputs
    out = torch.empty(num_rows, num_outputs, dtype=x.dtype, device=x.device)
    grids = weight.grids if weight.bits == 8 else weight.grids.view(torch.int32)
    with torch.cuda.device(x.get_device()):
        if tile.rows == 1:
            assert num_rows == 1
            grouped_row_kernel[(-(-num_outputs // tile.outputs),)](
                x,
                weight.words,
                grids,
                bias,
                out,
                num_outputs,
                weight.num_inputs,
                (_EXPONENT_OF_ONE + weight.bits) << _MANTISSA_BITS,
                BITS=weight.bits,
                BLOCK_OUTPUTS=tile.outputs,
                BLOCK_QUADS=max(1, tile.depth * weight.bits // _QUAD_BITS),
                num_warps=tile.num_warps,
                num_stages=tile.num_stages,
            )
        elif num_rows:
            grouped_rows_kernel[(-(-num_rows // tile.rows), -(-num_outputs // tile.outputs))](
                x,
                weight.words,
                grids,
                bias,
                out,
                num_rows,
                num_outputs,
                weight.num_inputs,
                x.stride(0),
                BITS=weight.bits,
                BLOCK_ROWS=tile.rows,
                BLOCK_OUTPUTS=tile.outputs,
                BLOCK_GROUPS=tile.depth // GROUP,
                PRODUCT_DTYPE=_product_dtype(x),
                PRECISION=_precision(x),
                num_warps=tile.num_warps,
                num_stages=tile.num_stages,
            )
    return out


def float8_matmul(x: Tensor, weight: Float8Weight, bias: Tensor | None, tile: Tile, *, exact_inputs: bool) -> Tensor:
    """x [T, K] -> y [T, N]"""
    if exact_inputs:
        return float8_product(x, None, weight, bias, tile, x.dtype)
    rows, row_scales = quantize_rows(x)
    if x.is_cuda and x.dtype == torch.bfloat16 and not any(size % _SCALED_MM_MULTIPLE for size in weight.values.shape):
        y = torch._scaled_mm(
            rows, weight.values.T, scale_a=row_scales, scale_b=weight.scales.T, out_dtype=torch.bfloat16
        )
        return y if bias is None else y.add_(bias)
    return float8_product(rows, row_scales, weight, bias, tile, x.dtype)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [T, K] -> [T, K] float8, scales [T, 1] float32; see `quantize_float8`"""
    values = torch.empty(x.shape, dtype=FLOAT8, device=x.device)
    scales = torch.empty(len(x), 1, dtype=torch.float32, device=x.device)
    with torch.cuda.device(x.get_device()):
        quantize_rows_kernel[(len(x),)](
            x, values, scales, x.shape[1], x.stride(0), SMALLEST_SCALE, BLOCK=_QUANTIZED_BLOCK
        )
    return values, scales


def float8_product(
    x: Tensor, row_scales: Tensor | None, weight: Float8Weight, bias: Tensor | None, tile: Tile, dtype: torch.dtype
) -> Tensor:
    """x [T, K] of `dtype`, or float8 with scales [T, 1] -> y [T, N] of `dtype`"""
    num_rows, num_outputs = len(x), weight.num_outputs
    out = torch.empty(num_rows, num_outputs, dtype=dtype, device=x.device)
    with torch.cuda.device(x.get_device()):
        if tile.rows == 1:
            assert num_rows == 1
            assert row_scales is None
            float8_row_kernel[(-(-num_outputs // tile.outputs),)](
                x,
                weight.values,
                weight.scales,
                bias,
                out,
                num_outputs,
                weight.num_inputs,
                BLOCK_OUTPUTS=tile.outputs,
                BLOCK_INPUTS=tile.depth,
                num_warps=tile.num_warps,
                num_stages=tile.num_stages,
            )
        elif num_rows:
            float8_rows_kernel[(-(-num_rows // tile.rows), -(-num_outputs // tile.outputs))](
                x,
                row_scales,
                weight.values,
                weight.scales,
                bias,
                out,
                num_rows,
                num_outputs,
                weight.num_inputs,
                x.stride(0),
                BLOCK_ROWS=tile.rows,
                BLOCK_OUTPUTS=tile.outputs,
                BLOCK_INPUTS=tile.depth,
                PRODUCT_DTYPE=None if row_scales is not None and x.is_cuda else _product_dtype(out),
                PRECISION=_precision(out),
                num_warps=tile.num_warps,
                num_stages=tile.num_stages,
            )
    return out


def _product_dtype(tensor: Tensor) -> tl.dtype:
    return _PRODUCT_DTYPES[tensor.dtype] if tensor.is_cuda else tl.float32  # the interpreter has no bfloat16


def _precision(tensor: Tensor) -> str:
    return "ieee" if tensor.dtype == torch.float32 else "tf32"

"""Launches the kernels for GPUs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton.language as tl
from torch import Tensor

from compression.grouped_weight import GROUP
from model_worker.engine.ops.quantized_matmul.float8_weight import FLOAT8, SMALLEST_SCALE, Float8Weight
from model_worker.engine.ops.quantized_matmul.packed_groups import PackedGroups
from model_worker.engine.ops.quantized_matmul.tiles import Tile
from model_worker.engine.ops.quantized_matmul.triton_kernels import (
    add_splits_kernel,
    float8_row_kernel,
    float8_rows_kernel,
    grouped_row_kernel,
    grouped_rows_kernel,
    quantize_rows_kernel,
)

_PRODUCT_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_QUANTIZED_BLOCK = 4096
_QUAD_BITS = 128
_CHUNK = 16  # numbers of float8 that a thread reads at once
_SCALED_MM_MULTIPLE = 16  # of both sizes of the weight
_SPLIT_ROWS = 64  # beyond which there are enough products to keep a device busy
_PROGRAMS_PER_MULTIPROCESSOR = 3  # so that enough of W is under way
_MIN_SPLIT_TILES, _MAX_SPLITS = 4, 8
_ADDED_BLOCK = 1024


def grouped_matmul(x: Tensor, weight: PackedGroups, bias: Tensor | None, tile: Tile) -> Tensor:
    """x [T, K] -> y [T, N]"""
    num_rows, num_outputs = len(x), weight.num_outputs
    out = torch.empty(num_rows, num_outputs, dtype=x.dtype, device=x.device)
    grids = weight.grids if weight.bits == 8 else weight.grids.view(torch.int32)
    if not num_rows:
        return out
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
                BITS=weight.bits,
                BLOCK_OUTPUTS=tile.outputs,
                BLOCK_QUADS=tile.depth * weight.bits // _QUAD_BITS,
                EMULATED=not x.is_cuda,
                num_warps=tile.num_warps,
            )
        else:
            splits = _splits(x, weight.num_inputs, num_outputs, tile)
            sums, added = (out, bias) if splits.number == 1 else (splits.partial(num_rows, num_outputs), None)
            grouped_rows_kernel[(-(-num_rows // tile.rows), -(-num_outputs // tile.outputs), splits.number)](
                x,
                weight.words,
                grids,
                added,
                sums,
                num_rows,
                num_outputs,
                weight.num_inputs,
                splits.num_tiles,
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
            if splits.number > 1:
                _add_splits(sums, bias, out)
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
    if not num_rows:
        return out
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
                BLOCK_CHUNKS=tile.depth // _CHUNK,
                num_warps=tile.num_warps,
            )
        else:
            splits = _splits(x, weight.num_inputs, num_outputs, tile)
            sums, added = (out, bias) if splits.number == 1 else (splits.partial(num_rows, num_outputs), None)
            float8_rows_kernel[(-(-num_rows // tile.rows), -(-num_outputs // tile.outputs), splits.number)](
                x,
                row_scales,
                weight.values,
                weight.scales,
                added,
                sums,
                num_rows,
                num_outputs,
                weight.num_inputs,
                splits.num_tiles,
                x.stride(0),
                BLOCK_ROWS=tile.rows,
                BLOCK_OUTPUTS=tile.outputs,
                BLOCK_INPUTS=tile.depth,
                PRODUCT_DTYPE=None if row_scales is not None and x.is_cuda else _product_dtype(out),
                PRECISION=_precision(out),
                num_warps=tile.num_warps,
                num_stages=tile.num_stages,
            )
            if splits.number > 1:
                _add_splits(sums, bias, out)
    return out


@dataclass(frozen=True, slots=True)
class _Splits:
    """How the inputs are divided among programs.

    Attributes:
        number: 1: they are not.
        num_tiles: of each but the last.
        device: of the products.
    """

    number: int
    num_tiles: int
    device: torch.device

    def partial(self, num_rows: int, num_outputs: int) -> Tensor:
        """For their sums. -> [splits, T, N] float32"""
        return torch.empty(self.number, num_rows, num_outputs, dtype=torch.float32, device=self.device)


def _splits(x: Tensor, num_inputs: int, num_outputs: int, tile: Tile) -> _Splits:
    """Few rows of a weight with few outputs are too few programs: their inputs are split.

    The number of rows has no part in it but by the tile, so that kernels of all steps are known beforehand.
    """
    num_tiles = -(-num_inputs // tile.depth)
    if tile.rows > _SPLIT_ROWS:
        return _Splits(1, num_tiles, x.device)
    wanted = _PROGRAMS_PER_MULTIPROCESSOR * _num_multiprocessors(x.device) // -(-num_outputs // tile.outputs)
    each = -(-num_tiles // max(1, min(wanted, _MAX_SPLITS, num_tiles // _MIN_SPLIT_TILES)))
    return _Splits(-(-num_tiles // each), each, x.device)


def _num_multiprocessors(device: torch.device) -> int:
    """Those of an H200 where kernels are interpreted."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def _add_splits(partial: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """out [T, N] = sum of partial [splits, T, N] + bias"""
    num_splits, num_rows, num_outputs = partial.shape
    add_splits_kernel[(num_rows, -(-num_outputs // _ADDED_BLOCK))](
        partial, bias, out, num_splits, num_outputs, BLOCK=_ADDED_BLOCK
    )


def _product_dtype(tensor: Tensor) -> tl.dtype:
    return _PRODUCT_DTYPES[tensor.dtype] if tensor.is_cuda else tl.float32  # the interpreter has no bfloat16


def _precision(tensor: Tensor) -> str:
    return "ieee" if tensor.dtype == torch.float32 else "tf32"

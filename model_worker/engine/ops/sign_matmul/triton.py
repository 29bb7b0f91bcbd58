"""Launches the kernels for GPUs: one for all segments, parts and planes of a layer."""

from __future__ import annotations

import math

import torch
import triton.language as tl
from torch import Tensor

from model_worker.engine.ops.low_rank.segment_plan import SegmentPlan
from model_worker.engine.ops.sign_matmul.sign_matrix import TABLE_COLUMNS, LayerSigns
from model_worker.engine.ops.sign_matmul.triton_kernels import add_signs_kernel, merged_linear_kernel

_OUTPUTS = 64  # of a program: with more, registers are spilled
_MERGED_OUTPUTS = 128
_FEW_WARPS, _MANY_WARPS = 4, 8
_MOST_REGISTERS = {_FEW_WARPS: 168, _MANY_WARPS: 255}  # of a thread: three programs of few warps, one of many
_TOP_BITS = -0x7F7F7F80  # 0x80808080
_MANY_ROWS = 64
_ALIGNMENT = 16
_MERGED_STAGES = {128: 4, 256: 3}  # by rows of a tile: what shared memory holds
_PRODUCT_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def add_signs(x: Tensor, out: Tensor, signs: LayerSigns, plan: SegmentPlan) -> None:
    """As the package's docstring says."""
    assert plan.tiles is not None
    assert signs.table is not None
    if not len(plan.tiles):
        return
    num_parts, num_entries, num_planes, _ = signs.table.shape
    many = plan.tile_rows >= _MANY_ROWS
    num_warps = _MANY_WARPS if many else _FEW_WARPS
    with torch.cuda.device(out.get_device()):
        add_signs_kernel[(len(plan.tiles), -(-max(signs.widths) // _OUTPUTS), num_parts)](
            x,
            out,
            plan.tiles,
            signs.table,
            x.shape[1],
            num_entries,
            num_planes,
            x.stride(0),
            out.stride(0),
            _TOP_BITS,
            TILE_ROWS=plan.tile_rows,
            NUM_WARPS=num_warps,
            BLOCK_OUTPUTS=_OUTPUTS,
            TABLE_COLUMNS=TABLE_COLUMNS,
            WIDTHS_MULTIPLE=_multiple(signs),
            PRODUCT_DTYPE=_product_dtype(x),
            PRECISION=_precision(x),
            num_warps=num_warps,
            maxnreg=_MOST_REGISTERS[num_warps],
        )


def merged_linear(
    x: Tensor, out: Tensor, weight: Tensor, bias: Tensor | None, signs: LayerSigns, plan: SegmentPlan, num_planes: int
) -> None:
    """As the package's docstring says."""
    assert plan.tiles is not None
    assert signs.table is not None
    if not len(plan.tiles):
        return
    num_parts, num_entries, max_planes, _ = signs.table.shape
    with torch.cuda.device(out.get_device()):
        merged_linear_kernel[(len(plan.tiles), -(-max(signs.widths) // _MERGED_OUTPUTS), num_parts)](
            x,
            out,
            weight,
            weight if bias is None else bias,
            plan.tiles,
            signs.table,
            x.shape[1],
            num_entries,
            x.stride(0),
            out.stride(0),
            MAX_PLANES=max_planes,
            NUM_PLANES=num_planes,
            TILE_ROWS=plan.tile_rows,
            BLOCK_OUTPUTS=_MERGED_OUTPUTS,
            TABLE_COLUMNS=TABLE_COLUMNS,
            WIDTHS_MULTIPLE=_multiple(signs),
            HAS_BIAS=bias is not None,
            PRODUCT_DTYPE=_product_dtype(x),
            PRECISION=_precision(x),
            num_warps=_MANY_WARPS,
            num_stages=_MERGED_STAGES[plan.tile_rows] if x.element_size() == 2 else 1,
        )


def _multiple(signs: LayerSigns) -> int:
    """What the parts' widths are multiples of, as far as that matters."""
    return math.gcd(*signs.widths, _ALIGNMENT)


def _product_dtype(x: Tensor) -> tl.dtype:
    """Of the products' operands."""
    return tl.float32 if not x.is_cuda and x.dtype == torch.bfloat16 else _PRODUCT_DTYPES[x.dtype]


def _precision(x: Tensor) -> str:
    return "ieee" if x.dtype == torch.float32 else "tf32"

"""Launches the kernel for GPUs: one for all segments and planes of a layer."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from model_worker.engine.ops.low_rank.segment_plan import SegmentPlan
from model_worker.engine.ops.sign_matmul.sign_matrix import TABLE_COLUMNS
from model_worker.engine.ops.sign_matmul.triton_kernels import add_signs_kernel

_BLOCKS = 4  # of 1,024 inputs
_BLOCK_BITS = 4  # of 32 words each: 128 inputs
_FEW_OUTPUTS, _MANY_OUTPUTS = 32, 128  # of a program: a few rows are limited by memory, and want many programs
_FEW_WARPS, _MANY_WARPS = 4, 8  # with four, a thread has eight of 32 outputs of one row, for which it makes 2^n x once
_ONE = 0x3F800000
_MANY_ROWS = 64
_PRODUCT_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def add_signs(x: Tensor, out: Tensor, table: Tensor, plan: SegmentPlan) -> None:
    """out [T, N] += x [T, K] times the planes of table [S, P, TABLE_COLUMNS], as the package's docstring says."""
    assert plan.tiles is not None
    if not len(plan.tiles):
        return
    _, num_planes, _ = table.shape
    num_inputs, num_outputs = x.shape[1], out.shape[1]
    many = plan.tile_rows >= _MANY_ROWS
    block_outputs = _MANY_OUTPUTS if many else _FEW_OUTPUTS
    with torch.cuda.device(out.get_device()):
        add_signs_kernel[(len(plan.tiles), -(-num_outputs // block_outputs))](
            x,
            out,
            plan.tiles,
            table,
            num_inputs,
            num_outputs,
            x.stride(0),
            out.stride(0),
            _ONE,
            NUM_PLANES=num_planes,
            TILE_ROWS=plan.tile_rows,
            BLOCKS=_BLOCKS,
            BLOCK_BITS=_BLOCK_BITS,
            BLOCK_OUTPUTS=block_outputs,
            TABLE_COLUMNS=TABLE_COLUMNS,
            PRODUCT_DTYPE=_PRODUCT_DTYPES[x.dtype] if x.is_cuda else tl.float32,  # the interpreter has no bfloat16
            PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
            num_warps=_MANY_WARPS if many else _FEW_WARPS,
        )

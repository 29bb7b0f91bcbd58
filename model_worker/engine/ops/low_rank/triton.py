"""Launches the kernels for GPUs: one to shrink and one to expand, for all segments and parts of a layer.

The sum over K is split, because a few rows and ranks alone would leave most of the device idle; `expand` adds the
splits up in their order, so that no atomic operation makes results differ from run to run.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model_worker.engine.ops.low_rank.factors import TABLE_COLUMNS, LowRankFactors
from model_worker.engine.ops.low_rank.segment_plan import SegmentPlan
from model_worker.engine.ops.low_rank.triton_kernels import expand_kernel, shrink_kernel

_SPLIT_INPUTS = 512  # of K; a multiple of _BLOCK_INPUTS
_BLOCK_INPUTS = 64
_BLOCK_OUTPUTS = 128
_MANY_ROWS = 64  # of a tile, whose sums do not fit the registers of four warps
_MANY_ROWS_RANKS = 32  # read at once by `expand` for such a tile: 64 spill registers
_FEW_WARPS, _MANY_WARPS = 4, 8
_MIN_BLOCK_RANKS, _MAX_BLOCK_RANKS = 16, 64  # the least that tensor cores multiply


def shrink(x: Tensor, factors: LowRankFactors, plan: SegmentPlan) -> Tensor:
    """x [T, K] -> t [splits, P, T, max_rank] float32, to be summed over splits; set as `shrink_reference` says."""
    assert plan.tiles is not None
    assert factors.table is not None
    num_inputs = x.shape[1]
    num_parts, num_segments, _ = factors.table.shape
    num_splits = -(-num_inputs // _SPLIT_INPUTS)
    block_ranks = _block_ranks(plan, _MAX_BLOCK_RANKS)
    rank_blocks = -(-plan.max_rank // block_ranks)
    t = torch.empty(num_splits, num_parts, plan.num_rows, plan.max_rank, dtype=torch.float32, device=x.device)
    if len(plan.tiles):
        with torch.cuda.device(x.get_device()):
            shrink_kernel[(len(plan.tiles), num_parts * rank_blocks, num_splits)](
                x,
                t,
                plan.tiles,
                factors.table,
                plan.num_rows,
                num_inputs,
                num_parts,
                num_segments,
                plan.max_rank,
                x.stride(0),
                TILE_ROWS=plan.tile_rows,
                BLOCK_RANKS=block_ranks,
                BLOCK_INPUTS=_BLOCK_INPUTS,
                SPLIT_INPUTS=_SPLIT_INPUTS,
                TABLE_COLUMNS=TABLE_COLUMNS,
                PRECISION=_precision(x),
            )
    return t


def expand(t: Tensor, out: Tensor, factors: LowRankFactors, plan: SegmentPlan) -> None:
    """Add t [splits, P, T, max_rank], summed over splits, times B to out [T, N], in place."""
    assert plan.tiles is not None
    assert factors.table is not None
    num_parts, num_segments, _ = factors.table.shape
    has_many_rows = plan.tile_rows >= _MANY_ROWS
    if len(plan.tiles):
        with torch.cuda.device(out.get_device()):
            expand_kernel[(len(plan.tiles), -(-max(factors.widths) // _BLOCK_OUTPUTS), num_parts)](
                t,
                out,
                plan.tiles,
                factors.table,
                plan.num_rows,
                num_segments,
                plan.max_rank,
                out.stride(0),
                NUM_SPLITS=len(t),
                TILE_ROWS=plan.tile_rows,
                BLOCK_RANKS=_block_ranks(plan, _MANY_ROWS_RANKS if has_many_rows else _MAX_BLOCK_RANKS),
                BLOCK_OUTPUTS=_BLOCK_OUTPUTS,
                TABLE_COLUMNS=TABLE_COLUMNS,
                PRECISION=_precision(out),
                num_warps=_MANY_WARPS if has_many_rows else _FEW_WARPS,
            )


def _precision(tensor: Tensor) -> str:
    """tf32 holds bfloat16 and float16 exactly, and t, whose range half precision does not have, to 11 bits."""
    return "ieee" if tensor.dtype == torch.float32 else "tf32"


def _block_ranks(plan: SegmentPlan, most: int) -> int:
    return min(max(1 << (plan.max_rank - 1).bit_length(), _MIN_BLOCK_RANKS), most)

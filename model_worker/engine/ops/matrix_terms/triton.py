"""Launches the kernel for GPUs: one for all segments and parts of a layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from model_worker.engine.ops.low_rank import SegmentPlan
from model_worker.engine.ops.matrix_terms.functional import TABLE_COLUMNS
from model_worker.engine.ops.matrix_terms.triton_kernels import add_matrices_kernel

_BLOCK_OUTPUTS = 32
_BLOCK_INPUTS = 128
_BLOCK_VALUES = 32  # of each output of a sparse matrix, at once


def add_matrices(x: Tensor, out: Tensor, table: Tensor, widths: Sequence[int], plan: SegmentPlan) -> None:
    """See functional.py."""
    assert plan.tiles is not None
    num_parts, num_variants, _ = table.shape
    if len(plan.tiles):
        with torch.cuda.device(out.get_device()):
            add_matrices_kernel[(len(plan.tiles), -(-max(widths) // _BLOCK_OUTPUTS), num_parts)](
                x,
                out,
                plan.tiles,
                table,
                x.shape[1],
                num_variants,
                x.stride(0),
                out.stride(0),
                TILE_ROWS=plan.tile_rows,
                BLOCK_OUTPUTS=_BLOCK_OUTPUTS,
                BLOCK_INPUTS=_BLOCK_INPUTS,
                BLOCK_VALUES=_BLOCK_VALUES,
                TABLE_COLUMNS=TABLE_COLUMNS,
                PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
            )

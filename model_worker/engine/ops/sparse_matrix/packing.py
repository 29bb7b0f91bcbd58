"""Sparse matrices of a fused layer's parts, put into the layout of its packed weight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from delta.variant_terms import SparseMatrix
from model_worker.engine.ops.cpu.step_variants import UNIT
from model_worker.engine.ops.linear.packed_weight import packed_order
from model_worker.engine.ops.sparse_matrix.packed_sparse import PackedSparse


class SparsePart(NamedTuple):
    """One part of a fused layer: its outputs, and its matrix, if it has one."""

    num_outputs: int
    matrix: SparseMatrix | None


def pack_sparse(parts: Sequence[SparsePart], *, gated: bool, dtype: torch.dtype) -> PackedSparse | None:
    """The matrices of all parts, as one; None: no part has one.

    Args:
        parts: in the order of the outputs.
        gated: the outputs are a gate and an up projection, to be interleaved.
        dtype: of the values.
    """
    matrices = [part.matrix for part in parts if part.matrix is not None]
    if not matrices:
        return None
    num_outputs = sum(part.num_outputs for part in parts)
    order = packed_order(num_outputs, gated=gated)  # [N padded]
    place_of = torch.empty(num_outputs, dtype=torch.int64)  # of each output, in the packed order
    place_of[order[order >= 0]] = (order >= 0).nonzero().flatten()
    counts = torch.cat(
        [
            torch.zeros(part.num_outputs, dtype=torch.int64) if part.matrix is None else part.matrix.row_starts.diff()
            for part in parts
        ]
    )
    longest = torch.zeros(len(order), dtype=torch.int64).index_copy_(0, place_of, counts).view(-1, UNIT).amax(dim=1)
    starts = torch.zeros(len(longest) + 1, dtype=torch.int64)
    torch.cumsum(longest, 0, out=starts[1:])
    all_columns = torch.cat([matrix.columns for matrix in matrices])
    last = int(all_columns.max()) if len(all_columns) else 0
    columns = torch.full((int(starts[-1]), UNIT), last, dtype=torch.int32)
    values = torch.zeros(columns.shape, dtype=dtype)
    # Numbers of all parts one after the other: each one's packed output, and its place among those of that output.
    outputs = torch.repeat_interleave(place_of, counts)
    places = torch.arange(len(outputs)) - torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    rows, lanes = starts[outputs // UNIT] + places, outputs % UNIT
    columns[rows, lanes] = all_columns
    values[rows, lanes] = torch.cat([matrix.values for matrix in matrices]).to(dtype)
    return PackedSparse(starts, columns, values)

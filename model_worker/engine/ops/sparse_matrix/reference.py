"""In torch, the matrix that a packed sparse matrix stands for."""

from __future__ import annotations

import torch
from torch import Tensor

from model_worker.engine.ops.sparse_matrix.packed_sparse import PackedSparse


def unpack(matrix: PackedSparse, num_inputs: int) -> Tensor:
    """-> [N padded, K] float32"""
    num_units, unit = len(matrix.starts) - 1, matrix.columns.shape[1]
    units = torch.repeat_interleave(torch.arange(num_units), matrix.starts.diff())
    outputs = units[:, None] * unit + torch.arange(unit)
    dense = torch.zeros(num_units * unit, num_inputs)
    return dense.index_put_((outputs, matrix.columns.long()), matrix.values.float(), accumulate=True)

"""Products with sparse matrices of variants, in torch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from delta.merge_terms import sparse_to_dense
from delta.variant_terms import SparseMatrix

_FEW_ROWS = 16  # from here on one dense product is cheaper than gathering the inputs of each row


def sparse_product(x: Tensor, matrix: SparseMatrix) -> Tensor:
    """x [T, K] times Z [N, K] transposed, summed in float32 where there are few rows. -> [T, N] in the dtype of x"""
    if len(x) > _FEW_ROWS:
        return functional.linear(x, sparse_to_dense(matrix, x.shape[1]).to(x.dtype))
    products = x.float().T[matrix.columns] * matrix.values.float()[:, None]  # [nnz, T]
    sums = torch.segment_reduce(products, "sum", offsets=matrix.row_starts, axis=0)
    return sums.T.to(x.dtype)

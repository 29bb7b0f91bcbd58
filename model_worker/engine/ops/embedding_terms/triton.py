"""Launches the kernel for GPUs."""

from __future__ import annotations

import torch
from torch import Tensor

from model_worker.engine.ops.embedding_terms.functional import (
    _HEADER_COLUMNS,
    _PLANE_COLUMNS,
    MAX_PLANES,
    TABLE_COLUMNS,
)
from model_worker.engine.ops.embedding_terms.triton_kernels import embed_rows_kernel

_BLOCK = 512


def embed_rows(tokens: Tensor, x: Tensor, table: Tensor, numbers: Tensor, num_tokens: int) -> None:
    """x [T, H] is changed; see functional.py."""
    assert x.is_contiguous()
    num_rows, size = x.shape
    with torch.cuda.device(x.get_device()):
        embed_rows_kernel[(num_rows, -(-size // _BLOCK))](
            tokens,
            x,
            table,
            numbers,
            num_tokens,
            size,
            MAX_PLANES=MAX_PLANES,
            HEADER_COLUMNS=_HEADER_COLUMNS,
            PLANE_COLUMNS=_PLANE_COLUMNS,
            TABLE_COLUMNS=TABLE_COLUMNS,
            BLOCK=_BLOCK,
        )

"""Products with planes of signs on CPUs, one segment after the other."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from model_worker.engine.ops.low_rank.segment_plan import SegmentPlan
from model_worker.engine.ops.sign_matmul.sign_matrix import SignMatrix


def add_signs_cpu(x: Tensor, out: Tensor, planes: Sequence[Sequence[SignMatrix]], plan: SegmentPlan) -> None:
    """As `add_signs`."""
    for (start, end), of_segment in zip(plan.bounds, planes, strict=True):
        if end > start and of_segment:
            rows = x[start:end].float()
            total = sum(_product(rows, plane, x.dtype) for plane in of_segment)
            out[start:end] += total


def _product(rows: Tensor, plane: SignMatrix, dtype: torch.dtype) -> Tensor:
    """rows [T, K] float32 -> u ∘ ((v ∘ rows) S^T) [T, N] float32"""
    scaled = (rows if plane.column_scale is None else rows * plane.column_scale).to(dtype)
    if plane.int4 is not None:
        signed: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(scaled, plane.int4, plane.group, plane.int4_scales)
    else:
        assert plane.matrix is not None
        signed = functional.linear(scaled, plane.matrix)
    return signed.float() * plane.row_scale

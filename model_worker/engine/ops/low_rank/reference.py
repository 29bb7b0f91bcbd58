"""Low-rank terms of segments as their formula says, one segment after the other: readable, and fast enough on CPUs."""

from __future__ import annotations

import torch
from torch import Tensor

from model_worker.engine.ops.low_rank.factors import LowRankFactors
from model_worker.engine.ops.low_rank.segment_plan import SegmentPlan


def shrink_reference(x: Tensor, factors: LowRankFactors, plan: SegmentPlan) -> Tensor:
    """x [T, K] -> t [P, T, max_rank] float32, of which the first r columns of rows with a term are set."""
    t = torch.empty(len(factors.parts), plan.num_rows, plan.max_rank, device=x.device)
    for t_of_part, part in zip(t, factors.parts, strict=True):
        for (start, end), pair in zip(plan.bounds, part, strict=True):
            if pair is not None:
                t_of_part[start:end, : len(pair.a)] = x[start:end].float() @ pair.a.float().T
    return t


def expand_reference(t: Tensor, out: Tensor, factors: LowRankFactors, plan: SegmentPlan) -> None:
    """Add t [P, T, max_rank] times B to out [T, N], in place."""
    columns = torch.split(out, list(factors.widths), dim=1)
    for t_of_part, of_part, part in zip(t, columns, factors.parts, strict=True):
        for (start, end), pair in zip(plan.bounds, part, strict=True):
            if pair is not None:
                of_part[start:end] += t_of_part[start:end, : pair.b.shape[1]] @ pair.b.float().T

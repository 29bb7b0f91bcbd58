"""Low-rank terms of segments of rows, over plain torch tensors.

    shrink    t[i, p] = x[i] A[p, s]^T
    expand    out[i, columns of part p] += t[i, p] B[p, s]^T          for each row i of segment s, and each part p

A layer has one part, or several where it computes several layers at once (q|k|v, gate|up). Rows that are in no segment,
and parts without a term, stay as they are.

    add_low_rank(x, out, factors, plan)          in place

        x       [T, K]; out [T, N]; both float32, bfloat16 or float16, with rows that are contiguous
        A       [r, K], B [N of the part, r], contiguous, of x's dtype; each at its own rank r

Sums are float32 whatever the dtype. `SegmentPlan` is made once for a step and serves all of its layers.

`reference.py` is the definition and serves CPUs. `triton.py` serves plans with tiles, those of GPUs: it reads A and B
where they are, by their addresses (`LowRankFactors.table`), computes each segment at its own rank, does all parts in
one launch, never waits for the device, and can be captured in a CUDA graph. How a row is summed up depends on K and r
only, not on other rows.

Source: Hu et al., arXiv 2106.09685; segments of a batch: Punica, arXiv 2310.18547, S-LoRA, arXiv 2311.03285.
"""

from __future__ import annotations

from torch import Tensor

from model_worker.engine.ops.low_rank.factors import Factors, LowRankFactors, table_rows
from model_worker.engine.ops.low_rank.reference import expand_reference, shrink_reference
from model_worker.engine.ops.low_rank.segment_plan import SegmentPlan, kernel_rank, tile_table, to_device

__all__ = [
    "Factors",
    "LowRankFactors",
    "SegmentPlan",
    "add_low_rank",
    "kernel_rank",
    "table_rows",
    "tile_table",
    "to_device",
]


def add_low_rank(x: Tensor, out: Tensor, factors: LowRankFactors, plan: SegmentPlan) -> None:
    """See the package's docstring."""
    assert x.dtype == out.dtype
    assert x.shape[0] == out.shape[0] == plan.num_rows
    assert x.stride(1) == out.stride(1) == 1
    if plan.tiles is not None:
        from model_worker.engine.ops.low_rank import triton  # not installed where there is no GPU

        triton.expand(triton.shrink(x, factors, plan), out, factors, plan)
    else:
        expand_reference(shrink_reference(x, factors, plan), out, factors, plan)

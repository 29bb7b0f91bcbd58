"""Planes of signs that variants add to a linear layer, in torch's and Triton's terms.

    out[row] += Σ u ∘ ((v ∘ x[row]) S^T)        for each row of a segment, over the planes that the segment has

        x     [T, K], out [T, N], both of one dtype, changed in place
        S     [N, K] of -1 and +1, one bit each; u [N], v [K] float32

The sums over K are float32 on GPUs, where v ∘ x is rounded to the dtype of x in segments of more rows than one; on CPUs
they are what torch's product with four-bit weights makes of them, which is float32 sums rounded to the dtype of x.

Source: Liu et al., arXiv 2402.10193 (BitDelta); scales of rows and columns: arXiv 2512.19720.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from model_worker.engine.ops.low_rank.segment_plan import SegmentPlan
from model_worker.engine.ops.sign_matmul.cpu_product import add_signs_cpu
from model_worker.engine.ops.sign_matmul.sign_matrix import SignMatrix, planes_table

__all__ = ["SignMatrix", "add_signs", "planes_table"]


def add_signs(
    x: Tensor, out: Tensor, planes: Sequence[Sequence[SignMatrix]], plan: SegmentPlan, table: Tensor | None = None
) -> None:
    """See the package's docstring.

    Args:
        planes: of each segment of the plan; not looked at where there is a table.
        table: of `planes_table`, [entries, planes, columns] on the device: an entry for each segment, or those that
            the plan's tiles name; None on CPUs.
    """
    assert x.dtype == out.dtype
    assert x.shape[0] == out.shape[0] == plan.num_rows
    assert x.stride(1) == out.stride(1) == 1
    if plan.tiles is not None:
        from model_worker.engine.ops.sign_matmul import triton  # not installed where there is no GPU

        assert table is not None
        triton.add_signs(x, out, table, plan)
    else:
        add_signs_cpu(x, out, planes, plan)

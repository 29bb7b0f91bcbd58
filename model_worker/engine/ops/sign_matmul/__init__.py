"""Planes of signs that variants add to a linear layer, in torch's and Triton's terms.

    add_signs        out[row, columns of part p] += Σ u ∘ ((v ∘ x[row]) S^T)
    merged_linear    out[row, columns of part p] = x[row] round(W + Σ u ∘ S ∘ v)^T + b

                     for each row of a segment and each part, over the planes that the part has there

        x     [T, K], out [T, N], W [N, K], b [N], all of one dtype; out is changed in place
        S     [N of the part, K] of -1 and +1, one bit each; u [N of the part], v [K] float32

The sums over K are float32 on GPUs, where v is rounded to the dtype of x in tiles of more rows than one, and v x of one
row to 23 bits or more beside the largest of 1,024 (triton_row.py); on CPUs they are what torch's product with four-bit
weights makes of them, which is float32 sums rounded to the dtype of x. `merged_linear` rounds to that dtype, too, as a
checkpoint does into which the planes were merged, and u and v before.

`add_signs` reads the planes beside the base's product. For many rows, which are multiplied with every sign, that would
be a second product of the same size: there `merged_linear` makes the sum, tile by tile, once for all rows of a tile,
and is the only product. It needs a GPU, and the base's weight as it is, not quantized.

Source: Liu et al., arXiv 2402.10193 (BitDelta); scales of rows and columns: arXiv 2512.19720.
"""

from __future__ import annotations

from torch import Tensor

from model_worker.engine.ops.low_rank.segment_plan import SegmentPlan
from model_worker.engine.ops.sign_matmul.cpu_product import add_signs_cpu
from model_worker.engine.ops.sign_matmul.sign_matrix import LayerSigns, SignMatrix, planes_table

__all__ = [
    "MANY_MERGED_ROWS",
    "MAX_MERGED_PLANES",
    "LayerSigns",
    "SignMatrix",
    "add_signs",
    "merged_linear",
    "merged_rows",
    "planes_table",
]

MAX_MERGED_PLANES = 2
"""Of a part; what a program can hold in registers."""

MANY_MERGED_ROWS = 1024
"""Of a step, from which on tiles have more."""


def add_signs(x: Tensor, out: Tensor, signs: LayerSigns, plan: SegmentPlan) -> None:
    """See the package's docstring."""
    assert x.dtype == out.dtype
    assert x.shape[0] == out.shape[0] == plan.num_rows
    assert x.stride(1) == out.stride(1) == 1
    if plan.tiles is not None:
        from model_worker.engine.ops.sign_matmul import triton  # not installed where there is no GPU

        triton.add_signs(x, out, signs, plan)
    else:
        for columns, planes in zip(signs.columns, signs.parts, strict=True):
            add_signs_cpu(x, out[:, columns], planes, plan)


def merged_linear(
    x: Tensor,
    out: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    signs: LayerSigns,
    plan: SegmentPlan,
    *,
    num_planes: int,
) -> None:
    """See the package's docstring; rows of `out` in no segment are left as they are.

    Args:
        plan: with tiles of `merged_rows` rows.
        num_planes: 1 to `MAX_MERGED_PLANES`; no part of a segment has more.
    """
    from model_worker.engine.ops.sign_matmul import triton  # not installed where there is no GPU

    assert x.dtype == out.dtype == weight.dtype
    assert x.shape[0] == out.shape[0] == plan.num_rows
    assert x.stride(1) == out.stride(1) == 1
    assert weight.is_contiguous()
    assert num_planes <= MAX_MERGED_PLANES
    triton.merged_linear(x, out, weight, bias, signs, plan, num_planes)


def merged_rows(num_rows: int, num_planes: int) -> int:
    """Rows of a tile for `merged_linear`.

    The more, the seldomer a sign is unpacked; but few rows are to occupy the whole device, too, and a second plane
    takes registers that the sums of more rows would need.
    """
    return 256 if num_rows >= MANY_MERGED_ROWS and num_planes == 1 else 128

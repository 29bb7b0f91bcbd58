"""Products with quantized weights.

    y = round(x W^T + b)        x [T, K], W [N, K], b [N] or none, y [T, N]

        PackedGroups    w[n, k] = scale[n, g] * value[n, k] + minimum[n, g],   g = k // 32; 4 or 8 bits
        Float8Weight    w[n, k] = scale[n] * value[n, k],   float8_e4m3fn
                        in steps of more than 64 rows x, too, is rounded to such numbers, each row with its own scale:
                        x'[t, k] = xscale[t] * float8(x[t, k] / xscale[t]),  xscale[t] = max|x[t]| / 448

        x, y, b    bfloat16, float16 or float32; rows of x contiguous; round is to x's dtype

Sums are float32. A GPU computes one row with W as it is, in the time of reading it; if W has groups, x is rounded to
integers of 16 bits, times a unit that each 16 or 32 inputs have: their largest magnitude / 32767. For more rows the
weights of groups are rounded to the dtype of x, and multiplied by tensor cores.

Float8 needs compute capability 8.9.

Source: group-wise grids: ggml (Q4_1, Q8_0); float8: Micikevicius et al., arXiv 2209.05433.
"""

from __future__ import annotations

from torch import Tensor

from model_worker.engine.ops.quantized_matmul.float8_weight import Float8Weight, quantize_float8
from model_worker.engine.ops.quantized_matmul.packed_groups import PackedGroups, pack_groups, unpack_groups
from model_worker.engine.ops.quantized_matmul.reference import float8_matmul_reference, grouped_matmul_reference
from model_worker.engine.ops.quantized_matmul.tiles import MatmulTiles, tiles_for
from model_worker.engine.ops.tuning.tuned_table import TunedTable

__all__ = [
    "Float8Weight",
    "MatmulTiles",
    "PackedGroups",
    "QuantizedWeight",
    "pack_groups",
    "quantize_float8",
    "quantized_matmul",
    "unpack_groups",
]

QuantizedWeight = PackedGroups | Float8Weight

_MAX_EXACT_ROWS = 64  # from here on the tensor cores' rate counts, which float8 doubles, not the bytes of W


def quantized_matmul(
    x: Tensor, weight: QuantizedWeight, bias: Tensor | None = None, tiles: MatmulTiles | None = None
) -> Tensor:
    """x [T, K] -> y [T, N]; see the module's docstring.

    Args:
        tiles: of this weight on this device (`tiles_for`); None: the default ones. Not looked at on CPUs.
    """
    assert x.ndim == 2
    assert x.shape[1] == weight.num_inputs
    assert x.stride(1) == 1
    exact_inputs = len(x) <= _MAX_EXACT_ROWS
    if x.device.type != "cuda":
        if isinstance(weight, PackedGroups):
            return grouped_matmul_reference(x, weight, bias)
        return float8_matmul_reference(x, weight, bias, exact_inputs=exact_inputs)
    from model_worker.engine.ops.quantized_matmul import triton  # not installed where there is no GPU

    tile = (tiles or tiles_for(weight, TunedTable())).for_rows(len(x))
    if isinstance(weight, PackedGroups):
        return triton.grouped_matmul(x, weight, bias, tile)
    return triton.float8_matmul(x, weight, bias, tile, exact_inputs=exact_inputs)

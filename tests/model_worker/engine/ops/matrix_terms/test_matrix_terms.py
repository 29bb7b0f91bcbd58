"""Products with variants' matrices, by the kernel for GPUs in the interpreter, are those with merged weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import ModuleType

import pytest
import torch

from delta.merge_terms import sparse_to_dense
from model_worker.engine.ops.low_rank import SegmentPlan
from model_worker.engine.ops.matrix_terms.functional import TABLE_COLUMNS, table_row
from tests.fakes.random_terms import random_sparse
from tests.model_worker.engine.ops.compile_for_gpu import assert_they_compile

CPU = torch.device("cpu")
_RTOL = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
WIDTHS = (40, 7)


@pytest.fixture(scope="module")
def kernels(interpreted: Callable[[str], ModuleType]) -> ModuleType:
    return interpreted("matrix_terms")


@pytest.mark.parametrize("dtype", _RTOL)
@pytest.mark.parametrize("num_inputs", [9, 200])
def test_dense_and_sparse_parts(kernels: ModuleType, num_inputs: int, dtype: torch.dtype) -> None:
    """Segments: a dense and a sparse part; nothing; two sparse parts; only the second part."""
    torch.manual_seed(0)
    dense = torch.randn(WIDTHS[0], num_inputs).to(dtype) / num_inputs**0.5
    sparse = [random_sparse(width, num_inputs, share=0.3, scale=0.2) for width in (WIDTHS[1], *WIDTHS)]
    sparse = [replace(each, values=each.values.to(dtype)) for each in sparse]
    parts = [
        [(dense, None), (None, None), (None, sparse[1]), (None, None)],
        [(None, sparse[0]), (None, None), (None, sparse[2]), (dense[: WIDTHS[1]], None)],
    ]
    firsts = (0, WIDTHS[0])
    table = torch.stack(
        [
            torch.stack([table_row(*terms, first, width) for terms in part])
            for part, first, width in zip(parts, firsts, WIDTHS, strict=True)
        ]
    )
    bounds = [(0, 1), (1, 3), (4, 7), (7, 8)]
    x, out = torch.randn(9, num_inputs).to(dtype), torch.randn(9, sum(WIDTHS)).to(dtype)
    expected = out.float()
    for part, first, width in zip(parts, firsts, WIDTHS, strict=True):
        for (start, end), (whole, few) in zip(bounds, part, strict=True):
            matrix = whole if few is None else sparse_to_dense(few, num_inputs)
            if matrix is not None:
                expected[start:end, first : first + width] += x[start:end].float() @ matrix.float().T
    plan = SegmentPlan.of(bounds, num_rows=9, max_rank=1, device=CPU).tiled(CPU)
    plan = replace(plan, tiles=torch.nn.functional.pad(plan.tiles, (0, 0, 0, 8)))  # as captured graphs have them
    kernels.add_matrices(x, out, table, WIDTHS, plan)
    torch.testing.assert_close(out, expected.to(dtype), rtol=_RTOL[dtype], atol=3 * _RTOL[dtype])


def test_it_compiles_for_gpus() -> None:
    types = {"x": "*bf16", "out": "*bf16", "tiles": "*i32", "table": "*i64"}
    constants = {
        "TILE_ROWS": 16, "BLOCK_OUTPUTS": 32, "BLOCK_INPUTS": 128, "BLOCK_VALUES": 32, "TABLE_COLUMNS": TABLE_COLUMNS,
        "PRECISION": "tf32",
    }  # fmt: skip
    module = "model_worker.engine.ops.matrix_terms.triton_kernels"
    assert_they_compile((module, "add_matrices_kernel", types, constants))

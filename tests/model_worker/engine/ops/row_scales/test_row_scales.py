"""Scales and shifts of variants' rows, by the kernel for GPUs in the interpreter."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest
import torch

from model_worker.engine.ops.row_scales.functional import table_row
from tests.model_worker.engine.ops.compile_for_gpu import assert_they_compile


@pytest.fixture(scope="module")
def kernels(interpreted: Callable[[str], ModuleType]) -> ModuleType:
    return interpreted("row_scales")


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("size", [3, 1500])
def test_the_formula(kernels: ModuleType, size: int, in_place: bool) -> None:
    torch.manual_seed(0)
    scales, shifts = torch.rand(4, size) + 0.5, torch.randn(4, size)
    table = torch.stack(
        [
            table_row(None, None),
            table_row(scales[1], None),
            table_row(None, shifts[2]),
            table_row(scales[3], shifts[3]),
        ]
    )
    x = torch.randn(6, size + 2)[:, :size]
    expected = x.clone()
    expected[2] = x[2] * scales[1]
    expected[3] = x[3] + shifts[2]
    expected[4:] = x[4:] * scales[3] + shifts[3]
    out = x if in_place else torch.empty(6, size)
    kernels.scale_rows(x, out, table, torch.tensor([0, 1, 2, 3, 4, 4]))
    torch.testing.assert_close(out, expected)


def test_it_compiles_for_gpus() -> None:
    types = {"x": "*bf16", "out": "*bf16", "table": "*i64", "numbers": "*i64"}
    module = "model_worker.engine.ops.row_scales.triton_kernels"
    assert_they_compile(
        *((module, "scale_rows_kernel", types, {"COPIES": copies, "BLOCK": 1024}) for copies in (True, False))
    )

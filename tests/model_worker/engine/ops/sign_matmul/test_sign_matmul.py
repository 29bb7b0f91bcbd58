"""Products with planes of signs are those with the matrices that the planes stand for, in torch and in Triton."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from delta.merge_terms import signs_to_dense, unpack_signs
from delta.variant_terms import SignPlane
from model_worker.engine.ops.low_rank import SegmentPlan
from model_worker.engine.ops.sign_matmul import LayerSigns, SignMatrix, add_signs, planes_table
from model_worker.engine.ops.sign_matmul.bit_planes import to_bit_planes
from model_worker.engine.ops.sign_matmul.sign_matrix import TABLE_COLUMNS
from tests.fakes.random_terms import random_plane
from tests.model_worker.engine.ops.compile_for_gpu import assert_they_compile

CPU = torch.device("cpu")
GPU_FORM = torch.device("meta")  # stands for any device but a CPU
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}

Bounds = list[tuple[int, int]]


@pytest.fixture(scope="module")
def kernels() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")  # read where kernels are defined, and where they are called
        pytest.importorskip("triton")
        yield importlib.import_module("model_worker.engine.ops.sign_matmul.triton")


Planes = list[list[list[SignPlane]]]
"""Of each part and segment."""


def _random_planes(widths: tuple[int, ...], num_inputs: int, bounds: Bounds, num_planes: tuple[int, ...]) -> Planes:
    numbers = (num_planes * (len(bounds) * len(widths) + 1))[: len(bounds) * len(widths)]
    scale = num_inputs**-0.5
    planes = [
        [random_plane(width, num_inputs, scale=scale, has_columns=bool(index % 2)) for index in range(number)]
        for width, number in zip([width for width in widths for _ in bounds], numbers, strict=True)
    ]
    return [planes[part * len(bounds) :][: len(bounds)] for part in range(len(widths))]


def _columns(widths: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(sum(widths[:part]), sum(widths[: part + 1])) for part in range(len(widths)))


def _expected(x: Tensor, base: Tensor, planes: Planes, columns: tuple[slice, ...], bounds: Bounds) -> Tensor:
    out = base.float().clone()
    for own, of_part in zip(columns, planes, strict=True):
        for (start, end), of_segment in zip(bounds, of_part, strict=True):
            for plane in of_segment:
                out[start:end, own] += x[start:end].float() @ signs_to_dense(plane, x.shape[1]).T
    return out.to(base.dtype)


def _signs(
    planes: Planes, columns: tuple[slice, ...], num_inputs: int, dtype: torch.dtype, *, on_gpu: bool
) -> LayerSigns:
    """In the form of CPUs, or of GPUs in memory where the interpreter finds it."""
    parts = tuple(
        tuple(
            tuple(SignMatrix(plane, num_inputs, dtype=dtype, device=CPU, has_bits=on_gpu) for plane in of_segment)
            for of_segment in of_part
        )
        for of_part in planes
    )
    if not on_gpu:
        return LayerSigns(parts, columns)
    most = max(len(of_segment) for of_part in planes for of_segment in of_part) + 1
    table = [
        torch.stack([planes_table(of_segment, most, own) for of_segment in of_part])
        for own, of_part in zip(columns, parts, strict=True)
    ]
    return LayerSigns(parts, columns, torch.stack(table))


def _outside(bounds: Bounds, num_rows: int) -> Tensor:
    """Which rows are in no segment."""
    outside = torch.ones(num_rows, dtype=torch.bool)
    for start, end in bounds:
        outside[start:end] = False
    return outside


def _check(
    bounds: Bounds,
    num_rows: int,
    *,
    kernels: ModuleType | None = None,
    num_inputs: int = 64,
    widths: tuple[int, ...] = (48, 16, 32),
    num_planes: tuple[int, ...] = (1, 2, 0),
    dtype: torch.dtype = torch.float32,
) -> None:
    planes, columns = _random_planes(widths, num_inputs, bounds, num_planes), _columns(widths)
    x, base = torch.randn(num_rows, num_inputs).to(dtype), torch.randn(num_rows, sum(widths)).to(dtype)
    out, plan = base.clone(), SegmentPlan.of(bounds, num_rows=num_rows, max_rank=0, device=CPU)
    signs = _signs(planes, columns, num_inputs, dtype, on_gpu=kernels is not None)
    if kernels is None:
        add_signs(x, out, signs, plan)
    else:
        kernels.add_signs(x, out, signs, plan.tiled(CPU))
    tolerance = _TOLERANCE[dtype]
    torch.testing.assert_close(out, _expected(x, base, planes, columns, bounds), rtol=tolerance, atol=tolerance)
    outside = _outside(bounds, num_rows)
    assert torch.equal(out[outside], base[outside])


_BATCHES: dict[str, tuple[Bounds, int]] = {
    "one row": ([(0, 1)], 1),
    "distinct": ([(row, row + 1) for row in range(8)], 8),
    "base rows between": ([(1, 3), (3, 4), (6, 6), (7, 9)], 10),
    "a prompt": ([(2, 90), (90, 91)], 95),
}


@pytest.mark.parametrize("batch", _BATCHES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_torch_on_batches_of_every_kind(batch: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    bounds, num_rows = _BATCHES[batch]
    _check(bounds, num_rows, dtype=dtype)


@pytest.mark.parametrize("batch", _BATCHES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_triton_on_batches_of_every_kind(kernels: ModuleType, batch: str, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    bounds, num_rows = _BATCHES[batch]
    _check(bounds, num_rows, kernels=kernels, dtype=dtype)


_PROMPTS: dict[str, tuple[Bounds, int]] = {
    "one, a whole tile": ([(0, 128)], 128),
    "ragged, base rows between": ([(3, 8), (8, 140), (150, 151)], 155),
    "none": ([(4, 4)], 5),
}


def _check_merged(
    kernels: ModuleType,
    bounds: Bounds,
    num_rows: int,
    *,
    num_inputs: int = 128,
    widths: tuple[int, ...] = (48, 16, 32),
    num_planes: tuple[int, ...] = (1, 0),
    dtype: torch.dtype = torch.float32,
    tile_rows: int = 128,
    has_bias: bool = True,
) -> None:
    planes, columns = _random_planes(widths, num_inputs, bounds, num_planes), _columns(widths)
    x, weight = torch.randn(num_rows, num_inputs).to(dtype), torch.randn(sum(widths), num_inputs).to(dtype)
    weight /= num_inputs**0.5
    bias = torch.randn(sum(widths)).to(dtype) if has_bias else None
    base = torch.nn.functional.linear(x.float(), weight.float(), None if bias is None else bias.float())
    out = torch.full((num_rows, sum(widths)), 7.0, dtype=dtype)
    plan = SegmentPlan.of(bounds, num_rows=num_rows, max_rank=0, device=CPU).tiled(CPU, tile_rows=tile_rows)
    signs = _signs(planes, columns, num_inputs, dtype, on_gpu=True)
    kernels.merged_linear(x, out, weight, bias, signs, plan, max(num_planes))
    outside = _outside(bounds, num_rows)
    expected = _expected(x, base, planes, columns, bounds).to(dtype)
    tolerance = _TOLERANCE[dtype]
    torch.testing.assert_close(out[~outside], expected[~outside], rtol=tolerance, atol=tolerance)
    assert (out[outside] == 7.0).all()


@pytest.mark.parametrize("batch", _PROMPTS)
@pytest.mark.parametrize("num_planes", [(1,), (1, 0), (2, 1, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_merged_on_batches_of_every_kind(
    kernels: ModuleType, batch: str, num_planes: tuple[int, ...], dtype: torch.dtype
) -> None:
    torch.manual_seed(4)
    bounds, num_rows = _PROMPTS[batch]
    _check_merged(kernels, bounds, num_rows, num_planes=num_planes, dtype=dtype)


@pytest.mark.parametrize(
    ("num_inputs", "widths"),
    [(1, (1,)), (33, (17, 5)), (64, (128,)), (300, (131,)), (1100, (48, 150)), (2112, (16, 1, 129))],
)
@pytest.mark.parametrize("has_bias", [False, True])
def test_merged_of_every_size(kernels: ModuleType, num_inputs: int, widths: tuple[int, ...], has_bias: bool) -> None:
    torch.manual_seed(5)
    _check_merged(kernels, [(1, 7)], 9, num_inputs=num_inputs, widths=widths, has_bias=has_bias)
    _check_merged(
        kernels, [(0, 5), (5, 262)], 263, num_inputs=num_inputs, widths=widths, tile_rows=256, dtype=torch.float16
    )


@pytest.mark.parametrize(("num_inputs", "num_outputs"), [(1, 1), (33, 17), (128, 16), (50, 64), (300, 131), (1100, 48)])
def test_every_size(kernels: ModuleType, num_inputs: int, num_outputs: int) -> None:
    torch.manual_seed(2)
    sizes: dict[str, Any] = {"num_inputs": num_inputs, "widths": (num_outputs,)}
    _check([(1, 2), (2, 5)], 6, **sizes)
    _check([(1, 2), (2, 5)], 6, **sizes, kernels=kernels)
    _check([(1, 2), (2, 5)], 6, **sizes, kernels=kernels, num_planes=(2, 3))


@pytest.mark.parametrize(("num_inputs", "num_outputs"), [(4096, 48), (5000, 70), (9300, 16)])
@pytest.mark.parametrize("num_planes", [1, 2])
def test_one_row_is_exact_but_for_what_the_docstring_says(
    kernels: ModuleType, num_inputs: int, num_outputs: int, num_planes: int
) -> None:
    """With inputs of very different size, blocks of zeros, and numbers at the ends of float32's range."""
    torch.manual_seed(6)
    for size in (1.0, 1e-12, 1e12):
        x = torch.randn(1, num_inputs) * torch.exp(3 * torch.randn(num_inputs)) * size
        x[:, :1024] = 0
        planes = [random_plane(num_outputs, num_inputs, scale=1.0, has_columns=True) for _ in range(num_planes)]
        columns = (slice(0, num_outputs),)
        out = torch.zeros(1, num_outputs)
        plan = SegmentPlan.of([(0, 1)], num_rows=1, max_rank=0, device=CPU).tiled(CPU)
        kernels.add_signs(x, out, _signs([[planes]], columns, num_inputs, torch.float32, on_gpu=True), plan)
        expected, lost = torch.zeros(num_outputs, dtype=torch.float64), torch.zeros(num_outputs, dtype=torch.float64)
        for plane in planes:
            assert plane.column_scale is not None
            scaled = (x[0] * plane.column_scale).double()
            signs = torch.where(unpack_signs(plane.bits, num_inputs), 1.0, -1.0).double()
            expected += plane.row_scale.double() * (signs @ scaled)
            for first in range(0, num_inputs, 1024):
                block = scaled[first : first + 1024]
                bits = torch.arange(len(block)) // 64 % 8
                rests = 2.0 ** (bits - 29.0) * block.abs().max()
                lost += plane.row_scale.double().abs() * 2 * rests.sum()
        error = (out[0].double() - expected).abs()
        assert (error <= lost / 8 + 1e-6 * expected.abs()).all()  # rests have both signs


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("number", [float("inf"), float("nan")])
def test_one_row_keeps_what_is_no_number(kernels: ModuleType, number: float) -> None:
    x, out = torch.randn(1, 2000), torch.zeros(1, 16)
    x[0, 1500] = number
    signs = _signs([[[random_plane(16, 2000)]]], (slice(0, 16),), 2000, torch.float32, on_gpu=True)
    kernels.add_signs(x, out, signs, SegmentPlan.of([(0, 1)], num_rows=1, max_rank=0, device=CPU).tiled(CPU))
    assert not out.isfinite().any()


def test_four_bits_and_plain_numbers_are_used_where_they_can_be() -> None:
    fits = SignMatrix(random_plane(32, 64), 64, dtype=torch.bfloat16, device=CPU)
    assert fits.int4 is not None
    assert fits.int4.nbytes == 32 * 64 // 2
    odd = SignMatrix(random_plane(32, 50), 50, dtype=torch.bfloat16, device=CPU)
    assert odd.matrix is not None
    on_gpu = SignMatrix(random_plane(32, 64), 64, dtype=torch.bfloat16, device=GPU_FORM)
    assert on_gpu.bits is not None
    assert on_gpu.bits.shape == (32, 1, 32)
    assert on_gpu.num_bytes == 32 * 1024 // 8 + 4 * (32 + 64)


@pytest.mark.parametrize("num_inputs", [1, 40, 1024, 2500])
def test_bits_are_where_the_docstring_says(num_inputs: int) -> None:
    torch.manual_seed(3)
    plane = random_plane(5, num_inputs)
    words = to_bit_planes(plane.bits)
    assert words.shape == (5, -(-num_inputs // 1024), 32)
    places = torch.arange(16, dtype=torch.int32)[:, None, None] + torch.tensor([0, 16], dtype=torch.int32)
    bits = (words[:, :, None, :, None] >> places) & 1  # [N, blocks, bit, word, half]
    found = bits.reshape(5, -1)
    assert torch.equal(found[:, :num_inputs].bool(), unpack_signs(plane.bits, num_inputs))
    assert not found[:, num_inputs:].any()


_KERNELS = "model_worker.engine.ops.sign_matmul.triton_kernels"
_TABLES = {"tiles": "*i32", "table": "*i64"}
_CONSTANTS = {
    "TABLE_COLUMNS": TABLE_COLUMNS,
    "WIDTHS_MULTIPLE": 16,
    "PRODUCT_DTYPE": "tl.bfloat16",
    "PRECISION": "tf32",
}


@pytest.mark.parametrize(("tile_rows", "num_warps", "maxnreg"), [(16, 4, 168), (64, 8, 255)])
def test_it_compiles_for_a_gpu(tile_rows: int, num_warps: int, maxnreg: int) -> None:
    sizes = {"TILE_ROWS": tile_rows, "NUM_WARPS": num_warps, "BLOCK_OUTPUTS": 64}
    pointers = {"x": "*bf16", "out": "*bf16", **_TABLES}
    options = {"num_warps": num_warps, "maxnreg": maxnreg}
    assert_they_compile((_KERNELS, "add_signs_kernel", pointers, {**sizes, **_CONSTANTS, **options}))


@pytest.mark.parametrize(("num_planes", "tile_rows", "num_stages"), [(1, 256, 3), (2, 128, 4)])
def test_merged_compiles_for_a_gpu(num_planes: int, tile_rows: int, num_stages: int) -> None:
    sizes = {"MAX_PLANES": 8, "NUM_PLANES": num_planes, "TILE_ROWS": tile_rows, "BLOCK_OUTPUTS": 128, "HAS_BIAS": True}
    options = {"num_warps": 8, "num_stages": num_stages}
    pointers = {"x": "*bf16", "out": "*bf16", "weight": "*bf16", "bias": "*bf16", **_TABLES}
    kernel = _KERNELS, "merged_linear_kernel", pointers, {**sizes, **_CONSTANTS, **options}
    assert_they_compile(kernel, capabilities=(90,))

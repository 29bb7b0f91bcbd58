"""The kernels for GPUs, run by Triton's interpreter, equal products with the weights that the packed ones stand for."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest
import torch

from compression.int4 import quantize_int4
from compression.int8 import quantize_int8
from model_worker.engine.ops.quantized_matmul.functional import (
    PackedGroups,
    pack_groups,
    quantize_float8,
    quantized_matmul,
)
from model_worker.engine.ops.quantized_matmul.tiles import ROW_CLASSES, Tile, default_tile
from tests.model_worker.engine.ops.compile_for_gpu import Kernel, assert_they_compile

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
_RTOL = {torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
_FIXED_RTOL = {**_RTOL, torch.float32: 1e-4}  # one row of integers of 16 bits


@pytest.fixture(scope="module")
def kernels(interpreted: Callable[[str], ModuleType]) -> ModuleType:
    return interpreted("quantized_matmul")


def _packed(num_outputs: int, num_inputs: int, bits: int) -> PackedGroups:
    matrix = torch.randn(num_outputs, num_inputs) / num_inputs**0.5
    return pack_groups((quantize_int4 if bits == 4 else quantize_int8)(matrix))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("num_outputs", "num_inputs"), [(1, 32), (20, 96), (10, 1056), (3, 4160)])
def test_one_row_of_groups(
    kernels: ModuleType, num_outputs: int, num_inputs: int, bits: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    weight, x = _packed(num_outputs, num_inputs, bits), torch.randn(1, num_inputs).to(dtype)
    for bias in (None, torch.randn(num_outputs).to(dtype)):
        for tile in (default_tile(1, f"int{bits}"), Tile(1, 8, 1024)):
            found = kernels.grouped_matmul(x, weight, bias, tile)
            expected = quantized_matmul(x, weight, bias)
            torch.testing.assert_close(found, expected, rtol=_FIXED_RTOL[dtype], atol=_FIXED_RTOL[dtype])


@pytest.mark.parametrize("bits", [4, 8])
def test_one_row_with_inputs_of_every_size(kernels: ModuleType, bits: int) -> None:
    """Integers have a unit of their own for each group: small groups are as exact as large ones."""
    torch.manual_seed(5)
    weight, tile = _packed(24, 256, bits), default_tile(1, f"int{bits}")
    x = torch.randn(1, 8, 32) * torch.tensor([0.0, 1e-30, 1e-6, 1.0, 3e4, 1e20, 0.0, 1e-20])[:, None]
    for kept in range(8):
        of_group = torch.zeros_like(x)
        of_group[:, kept] = x[:, kept]
        found = kernels.grouped_matmul(of_group.flatten(1), weight, None, tile)
        expected = quantized_matmul(of_group.flatten(1), weight)
        assert (found - expected).norm() <= 1e-4 * expected.norm()


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
def test_one_row_that_is_not_finite_has_no_finite_product(kernels: ModuleType, bits: int, wrong: float) -> None:
    weight, x = _packed(5, 96, bits), torch.ones(1, 96, dtype=torch.bfloat16)
    x[0, 45] = wrong
    assert kernels.grouped_matmul(x, weight, None, default_tile(1, f"int{bits}")).isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("num_rows", "num_outputs", "num_inputs"), [(2, 20, 32), (16, 33, 1120), (30, 70, 576), (70, 130, 256)]
)
def test_rows_of_groups(
    kernels: ModuleType, num_rows: int, num_outputs: int, num_inputs: int, bits: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(1)
    weight, wide = _packed(num_outputs, num_inputs, bits), torch.randn(num_rows, num_inputs + 7).to(dtype)
    x, bias = wide[:, :num_inputs], torch.randn(num_outputs).to(dtype)
    found = kernels.grouped_matmul(x, weight, bias, default_tile(num_rows, f"int{bits}"))
    torch.testing.assert_close(found, quantized_matmul(x, weight, bias), rtol=_RTOL[dtype], atol=_RTOL[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("num_rows", "num_outputs", "num_inputs"), [(1, 20, 50), (1, 9, 2100), (3, 33, 1090), (40, 70, 530), (64, 20, 130)]
)
def test_float8(kernels: ModuleType, num_rows: int, num_outputs: int, num_inputs: int, dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    weight = quantize_float8(torch.randn(num_outputs, num_inputs) / num_inputs**0.5)
    x, bias = torch.randn(num_rows, num_inputs).to(dtype), torch.randn(num_outputs).to(dtype)
    tile = default_tile(num_rows, "float8")
    found = kernels.float8_matmul(x, weight, bias, tile, exact_inputs=True)
    torch.testing.assert_close(found, quantized_matmul(x, weight, bias), rtol=_RTOL[dtype], atol=_RTOL[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_float8_with_rows_of_float8(kernels: ModuleType, dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    weight, x = quantize_float8(torch.randn(40, 96) / 10), torch.randn(65, 96).to(dtype)
    rows = quantize_float8(x)
    found = kernels.float8_product(rows.values, rows.scales, weight, None, default_tile(65, "float8"), dtype)
    torch.testing.assert_close(found, quantized_matmul(x, weight), rtol=_RTOL[dtype], atol=_RTOL[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_quantized(kernels: ModuleType, dtype: torch.dtype) -> None:
    """The interpreter adds a carry to the last bit of float8 without passing it on; the other numbers are compared."""
    torch.manual_seed(4)
    x = (torch.randn(3, 5000) * 10).to(dtype)
    x[1] = 0
    values, scales = kernels.quantize_rows(x)
    expected = quantize_float8(x)
    torch.testing.assert_close(scales, expected.scales)
    close = torch.isclose(values.float(), expected.values.float(), rtol=0.13, atol=1e-2)
    assert close.float().mean() > 0.97
    assert not values[1].float().any()


def test_no_rows(kernels: ModuleType) -> None:
    weight, x = _packed(8, 32, 4), torch.empty(0, 32)
    for rows in (1, 16):
        assert kernels.grouped_matmul(x, weight, None, default_tile(rows, "int4")).shape == (0, 8)
        tile = default_tile(rows, "float8")
        assert kernels.float8_matmul(x, quantize_float8(weight.dequantize()), None, tile, exact_inputs=True).shape == (
            0,
            8,
        )


@pytest.mark.parametrize(
    ("num_inputs", "tile", "splits"),
    [
        (4096, Tile(16, 64, 128), (6, 6)),
        (4096, Tile(128, 128, 64), (1, 64)),
        (1024, Tile(16, 64, 128), (2, 4)),
        (32, Tile(16, 64, 128), (1, 1)),
    ],
)
def test_inputs_are_split_where_programs_are_few(
    kernels: ModuleType, num_inputs: int, tile: Tile, splits: tuple[int, int]
) -> None:
    found = kernels._splits(torch.empty(1), num_inputs, 4096, tile)
    assert (found.number, found.num_tiles) == splits


def _kernels_in(dtype: str) -> list[Kernel]:
    module = "model_worker.engine.ops.quantized_matmul.triton_kernels"
    product = {"*bf16": "tl.bfloat16", "*fp16": "tl.float16"}[dtype]
    wanted: list[Kernel] = []
    for bits in (4, 8):
        types = {"x": dtype, "out": dtype, "bias": dtype, "words": "*i32", "grids": "*i32" if bits == 4 else "*fp16"}
        row_blocks = {"BITS": bits, "BLOCK_OUTPUTS": 8, "BLOCK_QUADS": 128, "EMULATED": False}
        wanted.append((module, "grouped_row_kernel", types, row_blocks))
        for tile in (default_tile(rows, f"int{bits}") for rows in ROW_CLASSES[1:]):
            blocks = {"BLOCK_ROWS": tile.rows, "BLOCK_OUTPUTS": tile.outputs, "BLOCK_GROUPS": tile.depth // 32}
            threads = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
            constants = {"bias": None, "PRODUCT_DTYPE": product, "PRECISION": "tf32"}
            wanted.append((module, "grouped_rows_kernel", types, {"BITS": bits, **blocks, **threads, **constants}))
    return wanted


def test_groups_compile_for_gpus() -> None:
    added = {"partial": "*fp32", "bias": "*bf16", "out": "*bf16"}
    module = "model_worker.engine.ops.quantized_matmul.triton_kernels"
    assert_they_compile(*_kernels_in("*bf16"), (module, "add_splits_kernel", added, {"BLOCK": 1024}))


def test_float8_compiles_for_gpus() -> None:
    module = "model_worker.engine.ops.quantized_matmul.triton_kernels"
    types = {"x": "*bf16", "values": "*fp8e4nv", "scales": "*fp32", "row_scales": "*fp32", "bias": "*bf16"}
    types |= {"out": "*bf16", "smallest": "fp32"}
    product = {"PRODUCT_DTYPE": "tl.bfloat16", "PRECISION": "tf32", "row_scales": None, "bias": None}
    blocks = {"BLOCK_ROWS": 16, "BLOCK_OUTPUTS": 64, "BLOCK_INPUTS": 128, "num_stages": 4}
    large = {"BLOCK_ROWS": 128, "BLOCK_OUTPUTS": 128, "BLOCK_INPUTS": 64, "num_warps": 8}
    assert_they_compile(
        (module, "float8_row_kernel", types, {"BLOCK_OUTPUTS": 8, "BLOCK_CHUNKS": 128}),
        (module, "float8_rows_kernel", types, {**blocks, **product}),
        (
            module,
            "float8_rows_kernel",
            {**types, "x": "*fp8e4nv"},
            {**large, "PRODUCT_DTYPE": None, "PRECISION": "tf32"},
        ),
        (module, "quantize_rows_kernel", types, {"BLOCK": 4096}),
        capabilities=(90, 89),
    )

"""Products with planes of signs are those with the matrices that the planes stand for, in torch and in Triton."""

from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from delta.merge_terms import signs_to_dense, unpack_signs
from delta.variant_terms import SignPlane
from model_worker.engine.ops.low_rank import SegmentPlan
from model_worker.engine.ops.sign_matmul import SignMatrix, add_signs, planes_table
from model_worker.engine.ops.sign_matmul.bit_planes import to_bit_planes
from tests.fakes.random_terms import random_plane

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


def _expected(x: Tensor, base: Tensor, planes: list[list[SignPlane]], bounds: Bounds) -> Tensor:
    out = base.float().clone()
    for (start, end), of_segment in zip(bounds, planes, strict=True):
        for plane in of_segment:
            out[start:end] += x[start:end].float() @ signs_to_dense(plane, x.shape[1]).T
    return out.to(base.dtype)


def _check(
    bounds: Bounds,
    num_rows: int,
    *,
    kernels: ModuleType | None = None,
    num_inputs: int = 64,
    num_outputs: int = 48,
    num_planes: tuple[int, ...] = (1, 2, 0),
    dtype: torch.dtype = torch.float32,
) -> None:
    planes = [
        [
            random_plane(num_outputs, num_inputs, scale=num_inputs**-0.5, has_columns=bool(index % 2))
            for index in range(number)
        ]
        for number in (num_planes * len(bounds))[: len(bounds)]
    ]
    x, base = torch.randn(num_rows, num_inputs).to(dtype), torch.randn(num_rows, num_outputs).to(dtype)
    out, plan = base.clone(), SegmentPlan.of(bounds, num_rows=num_rows, max_rank=0, device=CPU)
    if kernels is None:
        matrices = [[SignMatrix(plane, num_inputs, dtype=dtype, device=CPU) for plane in each] for each in planes]
        add_signs(x, out, matrices, plan)
    else:
        for_gpus = [[_on_gpu(plane, num_inputs, dtype) for plane in each] for each in planes]
        table = torch.stack([planes_table(each, max(num_planes)) for each in for_gpus])
        kernels.add_signs(x, out, table, plan.tiled(CPU))
    tolerance = _TOLERANCE[dtype]
    torch.testing.assert_close(out, _expected(x, base, planes, bounds), rtol=tolerance, atol=tolerance)
    in_segments = torch.zeros(num_rows, dtype=torch.bool)
    for start, end in bounds:
        in_segments[start:end] = True
    assert torch.equal(out[~in_segments], base[~in_segments])


def _on_gpu(plane: SignPlane, num_inputs: int, dtype: torch.dtype) -> SignMatrix:
    """The form that GPUs have, in memory where the interpreter finds it."""
    return SignMatrix(plane, num_inputs, dtype=dtype, device=CPU, has_bits=True)


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


@pytest.mark.parametrize(("num_inputs", "num_outputs"), [(1, 1), (33, 17), (128, 16), (50, 64), (300, 131), (1100, 48)])
def test_every_size(kernels: ModuleType, num_inputs: int, num_outputs: int) -> None:
    torch.manual_seed(2)
    _check([(1, 2), (2, 5)], 6, num_inputs=num_inputs, num_outputs=num_outputs)
    _check([(1, 2), (2, 5)], 6, num_inputs=num_inputs, num_outputs=num_outputs, kernels=kernels)
    _check([(1, 2), (2, 5)], 6, num_inputs=num_inputs, num_outputs=num_outputs, kernels=kernels, num_planes=(2, 3))


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
    bits = (words[:, :, None, :] >> torch.arange(32, dtype=torch.int32)[:, None]) & 1  # [N, blocks, bit, word]
    found = bits.reshape(5, -1)
    assert torch.equal(found[:, :num_inputs].bool(), unpack_signs(plane.bits, num_inputs))
    assert not found[:, num_inputs:].any()


def test_they_compile_for_a_gpu(tmp_path: Path) -> None:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    root = Path(__file__).parents[5]
    settings = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join([str(root), *sys.path])}
    settings.pop("TRITON_INTERPRET", None)
    script = Path(__file__).with_name("compile_for_gpu.py")
    done = subprocess.run([sys.executable, script], env=settings, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

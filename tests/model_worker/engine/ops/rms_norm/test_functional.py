"""Norms round where transformers' modules do; the kernels for GPUs, run by the interpreter, equal the readable ones."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import Tensor
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

from model_worker.engine.ops.rms_norm.functional import RowWeights, add_rms_norm, rms_norm, rms_norm_add
from tests.model_worker.engine.ops.compile_for_gpu import assert_they_compile

EPSILON = 1e-5
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# The interpreter cuts bfloat16 off where a GPU rounds: two of its steps, for two roundings.
_RTOL = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


@pytest.fixture(scope="module")
def kernels(interpreted: Callable[[str], ModuleType]) -> ModuleType:
    return interpreted("rms_norm")


def _close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=_RTOL[expected.dtype], atol=3 * _RTOL[expected.dtype])


def _row_weights(num_rows: int, weight: Tensor) -> RowWeights:
    """Of the last rows but one."""
    other = torch.rand(len(weight)).to(weight.dtype) + 0.5
    segments = ((num_rows // 2, num_rows - 1, other),)
    addresses = torch.zeros(num_rows + 3, dtype=torch.int64)
    addresses[num_rows // 2 : num_rows - 1] = other.data_ptr()
    return RowWeights(segments, addresses)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("module", [LlamaRMSNorm, Gemma2RMSNorm, Olmo2RMSNorm])
def test_every_family_rounds_as_its_module_does(module: type[torch.nn.Module], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    norm = module(96, eps=EPSILON).to(dtype)
    stored = torch.randn(96).to(dtype)
    norm.load_state_dict({"weight": stored})
    weight = {LlamaRMSNorm: stored, Gemma2RMSNorm: 1.0 + stored.float(), Olmo2RMSNorm: stored.float()}[module]
    x, residual = torch.randn(2, 7, 96).to(dtype)
    with torch.no_grad():
        assert torch.equal(rms_norm(x, weight, EPSILON), norm(x))
        expected = residual + x * 0.5
        total = residual.clone()
        assert torch.equal(add_rms_norm(x, total, weight, EPSILON, multiplier=0.5), norm(expected))
        assert torch.equal(total, expected)
        total = residual.clone()
        rms_norm_add(x, total, weight, EPSILON)
        assert torch.equal(total, residual + norm(x))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("wide_weight", [False, True])
@pytest.mark.parametrize(("num_rows", "size"), [(1, 1), (3, 96), (5, 576), (2, 5000)])
def test_whole_rows(kernels: ModuleType, num_rows: int, size: int, wide_weight: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    weight = torch.randn(size).to(torch.float32 if wide_weight else dtype)
    x, residual = torch.randn(2, num_rows, size).to(dtype)
    for row_weights in (None, _row_weights(num_rows, weight)):
        found = kernels.rms_norm(x, weight, EPSILON, num_heads=1, out=None, row_weights=row_weights)
        _close(found, rms_norm(x, weight, EPSILON, row_weights=row_weights))
        for multiplier in (1.0, 0.22):
            sums, expected = residual.clone(), residual.clone()
            options = {"multiplier": multiplier, "row_weights": row_weights}
            found = kernels.add_rms_norm(x, sums, weight, EPSILON, **options)
            _close(found, add_rms_norm(x, expected, weight, EPSILON, **options))
            _close(sums, expected)
            sums, expected = residual.clone(), residual.clone()
            kernels.rms_norm_add(x, sums, weight, EPSILON, **options)
            rms_norm_add(x, expected, weight, EPSILON, **options)
            _close(sums, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("own_weights", [False, True])
@pytest.mark.parametrize(("num_heads", "size"), [(1, 64), (5, 24), (40, 128), (3, 2048)])
def test_heads_in_place_in_a_wider_buffer(
    kernels: ModuleType, num_heads: int, size: int, own_weights: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(2)
    qkv = torch.randn(4, num_heads * size + 50).to(dtype)
    heads = qkv[:, : num_heads * size]
    weight = torch.randn(num_heads * size if own_weights else size).to(dtype)
    row_weights = _row_weights(4, weight)
    expected = rms_norm(heads, weight, EPSILON, num_heads=num_heads, row_weights=row_weights)
    rest = qkv[:, num_heads * size :].clone()
    out = kernels.rms_norm(heads, weight, EPSILON, num_heads=num_heads, out=heads, row_weights=row_weights)
    assert out is heads
    _close(heads, expected)
    assert torch.equal(qkv[:, num_heads * size :], rest)


def test_no_rows(kernels: ModuleType) -> None:
    x, weight = torch.empty(0, 8), torch.ones(8)
    assert kernels.rms_norm(x, weight, EPSILON, num_heads=1, out=None, row_weights=None).shape == (0, 8)
    assert kernels.add_rms_norm(x, x, weight, EPSILON, multiplier=1.0, row_weights=None).shape == (0, 8)


def test_they_compile_for_gpus() -> None:
    blocks = {"BLOCK_HEADS": 1, "BLOCK_SIZE": 4096, "ACCUMULATE": False}
    types = {"x": "*bf16", "residual": "*bf16", "out": "*bf16", "epsilon": "fp32", "multiplier": "fp32"}
    module = "model_worker.engine.ops.rms_norm.triton_kernels"
    kernels = []
    for weight in ("*bf16", "*fp32"):
        wanted = {**types, "weight": weight}
        kernels += [
            (module, "rms_norm_kernel", wanted, {**blocks, "addresses": None}),
            (module, "rms_norm_kernel", {**wanted, "addresses": "*i64"}, {**blocks, "ACCUMULATE": True}),
            (module, "add_rms_norm_kernel", {**wanted, "addresses": "*i64"}, {"BLOCK_SIZE": 4096}),
        ]
    assert_they_compile(*kernels)

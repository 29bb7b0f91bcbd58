"""Rotation rounds where transformers' functions do; the kernels, run by the interpreter, equal the readable ones."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from model_worker.engine.ops.rotary.functional import RotaryCosSin, rotary_table, rotate_and_write
from model_worker.engine.ops.rotary.reference import rotary_table_reference
from tests.model_worker.engine.ops.compile_for_gpu import assert_they_compile

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# The interpreter cuts bfloat16 off where a GPU rounds; products of numbers up to 4 are rounded before their sum is.
_TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 6e-2, torch.float16: 8e-3}


@pytest.fixture(scope="module")
def kernels(interpreted: Callable[[str], ModuleType]) -> ModuleType:
    return interpreted("rotary")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def _step(
    num_rows: int, heads: tuple[int, int], dims: tuple[int, int], dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A fused qkv buffer with something behind it, and views of its parts."""
    widths = [heads[0] * dims[0], heads[1] * dims[0], heads[1] * dims[1]]
    qkv = torch.randn(num_rows, sum(widths) + 8).to(dtype)
    query, key, value, _ = qkv.split([*widths, 8], dim=1)
    return qkv, query.unflatten(1, (heads[0], -1)), key.unflatten(1, (heads[1], -1)), value.unflatten(1, (heads[1], -1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounds_as_transformers_does(dtype: torch.dtype) -> None:
    config = LlamaConfig(hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
    rotary = LlamaRotaryEmbedding(config)
    positions = torch.tensor([0, 1, 17, 4095, 100000])
    _, query, key, value = _step(5, (4, 2), (16, 16), dtype)
    cos, sin = rotary(value, positions[None])
    expected_query, expected_key = apply_rotary_pos_emb(query.transpose(0, 1), key.transpose(0, 1), cos[0], sin[0], 0)
    table = rotary_table(positions, rotary.inv_freq, rotary.attention_scaling, dtype)
    caches = torch.zeros(2, 2, 4, 2, 16).to(dtype)
    kept_value = value.clone()
    rotate_and_write(query, key, value, table, caches[0], caches[1], torch.tensor([7, 0, 3, 1, 4]))
    assert torch.equal(query, expected_query.transpose(0, 1))
    assert torch.equal(caches[0].flatten(0, 1)[[7, 0, 3, 1, 4]], expected_key.transpose(0, 1))
    assert torch.equal(caches[1].flatten(0, 1)[[7, 0, 3, 1, 4]], kept_value)


@pytest.mark.parametrize("scaling", [1.0, 1.19])
@pytest.mark.parametrize("half", [1, 12, 32])
def test_angles_of_far_positions(kernels: ModuleType, half: int, scaling: float) -> None:
    frequencies = 1.0 / 10000.0 ** (torch.arange(half).float() / half)
    positions = torch.cat([torch.arange(40), torch.arange(131052, 131072)])
    cos, sin = torch.full((2, 60, half), torch.nan).unbind(0)
    kernels.fill_rotary_table(positions, frequencies, scaling, cos, sin)
    expected = rotary_table_reference(positions, frequencies, scaling, torch.float32)
    torch.testing.assert_close(cos, expected.cos, rtol=0, atol=1e-6)
    torch.testing.assert_close(sin, expected.sin, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [(2, 2), (8, 2), (9, 3), (7, 1)])
@pytest.mark.parametrize(("dims", "half"), [((16, 16), 8), ((24, 40), 12), ((80, 64), 20), ((8, 5), 3)])
def test_every_shape(
    kernels: ModuleType, dims: tuple[int, int], half: int, heads: tuple[int, int], dtype: torch.dtype
) -> None:
    qkv, query, key, value = _step(5, heads, dims, dtype)
    before, query_before = qkv.clone(), query.clone()
    table = rotary_table(torch.tensor([3, 0, 77, 9, 0]), torch.rand(half), 1.0, dtype)
    slots = torch.tensor([5, -1, 0, 11, -1])
    caches, expected = ([torch.full((3, 4, heads[1], dim), 0.25).to(dtype) for dim in dims] for _ in range(2))
    kernels.rotate_and_write(query, key, value, *table, *caches, slots)
    found = query.clone()
    assert torch.equal(qkv[:, heads[0] * dims[0] :], before[:, heads[0] * dims[0] :])
    assert torch.equal(query[:, :, 2 * half :], query_before[:, :, 2 * half :])
    qkv.copy_(before)
    rotate_and_write(query, key, value, RotaryCosSin(*table), *expected, slots)
    tolerance = _TOLERANCE[dtype]
    torch.testing.assert_close(found[slots >= 0], query[slots >= 0], rtol=tolerance, atol=tolerance)
    for cache, wanted in zip(caches, expected, strict=True):
        torch.testing.assert_close(cache, wanted, rtol=tolerance, atol=tolerance)


def test_float8_caches(kernels: ModuleType) -> None:
    _, query, key, value = _step(3, (4, 2), (16, 16), torch.bfloat16)
    value.copy_((value * 2).round() / 2)  # exact in float8: the interpreter rounds in another way
    table = rotary_table(torch.zeros(3, dtype=torch.int64), torch.rand(8), 1.0, torch.bfloat16)
    key.copy_((key * 2).round() * 128)  # not rotated at position 0
    caches, expected = ([torch.zeros(3, 4, 2, 16).to(torch.float8_e4m3fn) for _ in range(2)] for _ in range(2))
    slots = torch.tensor([5, 0, 11])
    kernels.rotate_and_write(query.clone(), key.clone(), value, *table, *caches, slots)
    rotate_and_write(query, key, value, table, expected[0], expected[1], slots)
    for cache, wanted in zip(caches, expected, strict=True):
        assert torch.equal(cache.float(), wanted.float())
    assert caches[0].float().abs().max() == 448


def test_without_a_table_nothing_is_rotated() -> None:
    _, query, key, value = _step(2, (4, 2), (8, 8), torch.float32)
    before, caches = query.clone(), torch.zeros(2, 1, 4, 2, 8)
    rotate_and_write(query, key, value, None, caches[0], caches[1], torch.tensor([2, -1]))
    assert torch.equal(query, before)
    assert torch.equal(caches[0, 0, 2], key[0])
    assert torch.equal(caches[1, 0, 2], value[0])
    assert caches.count_nonzero() == 2 * key[0].numel()


def test_they_compile_for_gpus() -> None:
    module = "model_worker.engine.ops.rotary.triton_kernels"
    pointers = dict.fromkeys(("query", "key", "value", "cos", "sin", "key_cache", "value_cache"), "*bf16")
    pointers |= {"slot_mapping": "*i64", "positions": "*i64", "inverse_frequencies": "*fp32"}
    shape = {"NUM_KV_HEADS": 8, "NUM_SHARED": 4, "KEY_DIM": 128, "VALUE_DIM": 128, "HALF": 64, "num_warps": 1}
    blocks = {"BLOCK_SHARED": 4, "BLOCK_HALF": 64, "BLOCK_REST": 1, "BLOCK_VALUE_DIM": 128}
    table = {"HALF": 64, "BLOCK_HALF": 64, "num_warps": 1}
    assert_they_compile(
        (module, "rotate_and_write_kernel", pointers, {**shape, **blocks}),
        (module, "rotate_and_write_kernel", pointers, {**shape, **blocks, "HALF": 20, "BLOCK_REST": 128}),
        (module, "rotary_table_kernel", {**pointers, "attention_scaling": "fp32"}, table),
    )
    eights = {**pointers, "key_cache": "*fp8e4nv", "value_cache": "*fp8e4nv"}
    assert_they_compile((module, "rotate_and_write_kernel", eights, {**shape, **blocks}), capabilities=(90,))

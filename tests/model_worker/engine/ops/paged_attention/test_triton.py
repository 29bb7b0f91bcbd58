"""The kernels for GPUs, run by Triton's interpreter, equal the readable attention on batches of every kind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch

from model_worker.engine.ops.paged_attention import AttentionMetadata, AttentionParams
from model_worker.engine.ops.paged_attention.reference import write_kv_reference
from model_worker.engine.ops.paged_attention.triton_tiles import tile_shapes
from tests.model_worker.engine.ops.compile_for_gpu import assert_they_compile
from tests.model_worker.engine.ops.paged_attention.attention_batches import Case, batch, compare

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DECODES = [(0, 1), (30, 1), (150, 1), (63, 1), (64, 1)]
MIXED = [(0, 20), (77, 1), (30, 5), (130, 40)]


@pytest.fixture(scope="module")
def kernels(interpreted: Callable[[str], ModuleType]) -> ModuleType:
    return interpreted("paged_attention")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", [DECODES, MIXED, [(0, 3)]], ids=["decode", "mixed", "prompt"])
def test_every_kind_of_batch(kernels: ModuleType, lengths: list[tuple[int, int]], dtype: torch.dtype) -> None:
    compare(kernels.paged_attention, Case(lengths, dtype=dtype))


_OPTIONS: list[dict[str, Any]] = [
    {"sliding_window": 1},
    {"sliding_window": 33},
    {"chunk_size": 32},
    {"sliding_window": 7, "chunk_size": 50},
    {"softcap": 3.0},
    {"sinks": True},
    {"alibi": torch.float32},
    {"alibi": torch.float16},
    {"softcap": 3.0, "sinks": True, "alibi": torch.float32, "sliding_window": 33},
]


def _name(options: dict[str, Any]) -> str:
    return "-".join(options)


@pytest.mark.parametrize("options", _OPTIONS, ids=_name)
def test_every_option(kernels: ModuleType, options: dict[str, Any]) -> None:
    for lengths in (DECODES, MIXED):
        compare(kernels.paged_attention, Case(lengths, options=options))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", _OPTIONS, ids=_name)
def test_every_option_in_half_precision_with_float8_too(
    kernels: ModuleType, options: dict[str, Any], dtype: torch.dtype
) -> None:
    for kv_dtype in (None, torch.float8_e4m3fn):
        compare(kernels.paged_attention, Case([(70, 1), (30, 5)], dtype=dtype, kv_dtype=kv_dtype, options=options))


@pytest.mark.parametrize("heads", [(4, 4), (9, 3), (20, 1)])
@pytest.mark.parametrize("dims", [(8, 8), (24, 40), (80, 64)])
def test_every_shape_of_heads(kernels: ModuleType, heads: tuple[int, int], dims: tuple[int, int]) -> None:
    compare(kernels.paged_attention, Case([(40, 1), (3, 4), (0, 70)], heads=heads, dims=dims))


@pytest.mark.parametrize("heads", [(2, 2), (3, 1), (7, 1), (8, 1)])
@pytest.mark.parametrize(
    ("dim", "dtype"),
    [
        (64, torch.bfloat16),
        (80, torch.float16),
        (96, torch.bfloat16),
        (128, torch.float16),
        (128, torch.bfloat16),
        (192, torch.float16),
        (256, torch.bfloat16),
    ],
)
def test_shapes_of_models(kernels: ModuleType, heads: tuple[int, int], dim: int, dtype: torch.dtype) -> None:
    """A step that decodes, and one with a prompt and drafts."""
    for lengths in ([(0, 1), (64, 1)], [(40, 1), (3, 4), (0, 14)]):
        compare(kernels.paged_attention, Case(lengths, block_size=16, heads=heads, dims=(dim, dim), dtype=dtype))


@pytest.mark.parametrize("block_size", [1, 3, 16, 128])
def test_every_block_size(kernels: ModuleType, block_size: int) -> None:
    compare(kernels.paged_attention, Case(MIXED, block_size=block_size))


@pytest.mark.parametrize("before", [14, 15, 16, 62, 63, 64])
def test_lengths_around_blocks_and_tiles(kernels: ModuleType, before: int) -> None:
    compare(kernels.paged_attention, Case([(before, 1)], block_size=16))
    compare(kernels.paged_attention, Case([(0, before), (1, before)], block_size=16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float8_keys_and_values(kernels: ModuleType, dtype: torch.dtype) -> None:
    compare(kernels.paged_attention, Case(MIXED, dtype=dtype, kv_dtype=torch.float8_e4m3fn))


@pytest.mark.parametrize("options", [{}, {"sliding_window": 300, "sinks": True}])
def test_the_context_of_few_sequences_is_split(kernels: ModuleType, options: dict[str, Any]) -> None:
    for lengths in ([(700, 1), (10, 1)], [(600, 3)]):
        compare(kernels.paged_attention, Case(lengths, heads=(2, 1), options=options))


def test_many_heads_share_a_key(kernels: ModuleType) -> None:
    """As in falcon: a tile of one query has the rows of tiles for prompts."""
    compare(kernels.paged_attention, Case([(9, 1), (0, 2)], heads=(71, 1), dims=(64, 64), dtype=torch.bfloat16))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("context", [1, 64, 65, 128, 129, 256])
def test_contexts_that_fill_their_splits(kernels: ModuleType, context: int, dtype: torch.dtype) -> None:
    """A split has 64 keys where there is little to do."""
    compare(kernels.paged_attention, Case([(context - 1, 1)], block_size=16, heads=(2, 1), dtype=dtype))


def test_rows_that_fill_a_batch_up_are_zeros_and_a_replay_reads_new_lengths(kernels: ModuleType) -> None:
    metadata, num_blocks = batch([(300, 1), (80, 1), (20, 1)], 8)
    key_cache, value_cache = torch.randn(2, num_blocks, 8, 2, 16).unbind(0)
    query, params = torch.randn(3, 4, 16), AttentionParams(scale=0.3, sinks=torch.randn(4))
    expected = kernels.paged_attention(query, key_cache, value_cache, metadata, params)
    captured = replace(metadata, seq_lens=(1, 1, 1), device_seq_lens=torch.zeros(3, dtype=torch.int32), plans={})
    assert captured.device_seq_lens is not None
    assert not kernels.paged_attention(query, key_cache, value_cache, captured, params).any()
    captured.device_seq_lens.copy_(torch.tensor([301, 0, 21]))
    out = kernels.paged_attention(query, key_cache, value_cache, captured, params)
    assert torch.equal(out[[0, 2]], expected[[0, 2]])
    assert not out[1].any()


def test_layers_of_several_kinds_share_one_metadata(kernels: ModuleType) -> None:
    metadata, num_blocks = batch(MIXED, 8)
    key_cache, value_cache = torch.randn(2, num_blocks, 8, 2, 16).unbind(0)
    query = torch.randn(metadata.query_start[-1], 4, 16)
    for options in ({}, {"sliding_window": 9}, {"softcap": 2.0}, {}):
        params = AttentionParams(scale=0.3, **options)
        out = kernels.paged_attention(query, key_cache, value_cache, metadata, params)
        fresh: AttentionMetadata = replace(metadata, plans={})
        assert torch.equal(out, kernels.paged_attention(query, key_cache, value_cache, fresh, params))


def test_heads_may_lie_anywhere(kernels: ModuleType) -> None:
    metadata, num_blocks = batch(MIXED, 8)
    key_cache, value_cache = torch.randn(2, num_blocks, 8, 2, 16).unbind(0)
    wide, params = torch.randn(metadata.query_start[-1], 100), AttentionParams(scale=0.3)
    query = wide[:, 20:84].unflatten(1, (4, 16))
    expected = kernels.paged_attention(query.contiguous(), key_cache, value_cache, metadata, params)
    assert torch.equal(kernels.paged_attention(query, key_cache, value_cache, metadata, params), expected)
    by_head = query.transpose(0, 1).contiguous().transpose(0, 1)  # as transformers has them
    assert torch.equal(kernels.paged_attention(by_head, key_cache, value_cache, metadata, params), expected)


@pytest.mark.parametrize("cache_dtype", [None, torch.float8_e4m3fn])
@pytest.mark.parametrize("dtype", DTYPES)
def test_keys_and_values_go_to_their_slots_only(
    kernels: ModuleType, dtype: torch.dtype, cache_dtype: torch.dtype | None
) -> None:
    key_cache, value_cache = torch.zeros(3, 4, 2, 600), torch.zeros(3, 4, 2, 24)
    caches = [cache.to(cache_dtype or dtype) for cache in (key_cache, value_cache)]
    expected = [cache.clone() for cache in caches]
    # Numbers that float8 holds exactly: the interpreter rounds in another way.
    numbers = (torch.randn(5, 2 * 624) * 4).round() * 2.0 ** torch.randint(-6, 5, (5, 1))
    numbers[0, ::7], numbers[2, ::5] = 1e4, -1e4
    if cache_dtype is None:
        numbers = numbers.clamp(-448, 448)
    wide = numbers.to(dtype)
    key, value = wide[:, :1200].unflatten(1, (2, 600)), wide[:, 1200:].unflatten(1, (2, 24))
    slots = torch.tensor([9, -1, 2, 11, -1])
    kernels.write_kv(key, value.transpose(0, 1).contiguous().transpose(0, 1), *caches, slots)
    write_kv_reference(key, value, *expected, slots)
    for found, wanted in zip(caches, expected, strict=True):
        assert torch.equal(found.float(), wanted.float())
        assert found.float().count_nonzero() > 0


_SHAPE = {"NUM_KV_HEADS": 8, "NUM_SHARED": 4, "BLOCK_SIZE": 16, "KEY_DIM": 128, "VALUE_DIM": 128}
_LIMITS = {"TILE_KEYS": 64, "WINDOW": None, "CHUNK": None}
_PLAIN = {
    **_SHAPE,
    **_LIMITS,
    "BLOCK_KEY_DIM": 128,
    "BLOCK_VALUE_DIM": 128,
    "PRODUCT_DTYPE": "tl.bfloat16",
    "PRECISION": "tf32",
    "sinks": None,
    "slopes": None,
    "softcap": None,
    "alibi_multiplier": None,
}
_POINTERS = {
    **dict.fromkeys(("query", "out", "key", "value", "key_cache", "value_cache"), "*bf16"),
    **dict.fromkeys(("block_tables", "seq_lens", "tiles"), "*i32"),
    **dict.fromkeys(("partial_out", "partial_log", "sinks", "slopes"), "*fp32"),
    **dict.fromkeys(("scale", "softcap", "alibi_multiplier"), "fp32"),
    "slot_mapping": "*i64",
}
_MODULE = "model_worker.engine.ops.paged_attention.triton_kernels"
_DECODE = {**_PLAIN, "tiles": None, "TILE_ROWS": 16, "num_warps": 4, "num_stages": 5}
_PROMPT = {**_PLAIN, "seq_lens": None, "TILE_ROWS": 128, "num_warps": 8}
_NOT_PLAIN = {"sinks", "slopes", "softcap", "alibi_multiplier"}


def test_they_compile_for_gpus() -> None:
    written = {"NUM_KV_HEADS": 8, "KEY_DIM": 128, "VALUE_DIM": 128, "BLOCK": 1024}
    merged = {**_LIMITS, "tiles": None, "NUM_HEADS": 32, "VALUE_DIM": 128, "BLOCK_VALUE_DIM": 128, "BLOCK_SPLITS": 64}
    assert {shape.tile_rows for shape in tile_shapes(4, 128, torch.bfloat16, has_227_kib=True)} == {16, 128}
    every = {key: value for key, value in _DECODE.items() if key not in _NOT_PLAIN}
    assert_they_compile(
        (_MODULE, "attend_kernel", _POINTERS, _DECODE),
        (_MODULE, "attend_kernel", _POINTERS, {**_PROMPT, "num_stages": 3}),
        (_MODULE, "attend_kernel", _POINTERS, {**every, "WINDOW": 1024, "num_stages": 3}),
        (_MODULE, "attend_kernel", {**_POINTERS, "slopes": "*bf16"}, {**every, "CHUNK": 512, "num_stages": 3}),
        (_MODULE, "merge_kernel", _POINTERS, merged),
        (_MODULE, "write_kernel", _POINTERS, written),
    )
    eights = {**_POINTERS, "key_cache": "*fp8e4nv", "value_cache": "*fp8e4nv"}
    singles = {name: "*fp32" if kind == "*bf16" else kind for name, kind in _POINTERS.items()}
    widened = {"PRODUCT_DTYPE": "tl.float16"}
    exact = {**_DECODE, "TILE_KEYS": 32, "num_stages": 3, "PRODUCT_DTYPE": "tl.float32", "PRECISION": "tf32x3"}
    assert_they_compile(
        (_MODULE, "attend_kernel", eights, {**_DECODE, **widened}),
        (_MODULE, "write_kernel", eights, written),
        (_MODULE, "attend_kernel", singles, exact),
        capabilities=(90,),
    )

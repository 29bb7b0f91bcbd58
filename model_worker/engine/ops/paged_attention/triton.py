"""Launches the kernels for GPUs: one for each kind of tile in the batch, and one where splits have to be merged.

How a step is cut into tiles and splits is a plan, made once and kept in `AttentionMetadata.plans` for all layers of a
shape. Sequences with few query rows (decoding, and with drafts) are one small tile each; others (prompts) are cut into
large ones, those with most keys first. The context is split so far that all multiprocessors have work.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

import torch
import triton.language as tl
from torch import Tensor

from model_worker.engine.ops.low_rank.segment_plan import to_device
from model_worker.engine.ops.paged_attention.metadata import AttentionMetadata, AttentionParams
from model_worker.engine.ops.paged_attention.triton_kernels import attend_kernel, merge_kernel, write_kernel
from model_worker.engine.ops.paged_attention.triton_tiles import TileShape, tile_shapes, tuned_shapes
from model_worker.engine.ops.tuning.tuned_table import TunedTable, table_of

_MAX_SPLITS = 64  # what a program merges at once
_MANY_SPLIT_KEYS = 1024  # beside which the time of merging is little
_WRITE_BLOCK = 1024
_PRODUCT_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@dataclass(frozen=True, slots=True)
class _Gpu:
    """What tiles and splits are chosen for; an H200 where kernels are interpreted."""

    num_multiprocessors: int = 132
    has_227_kib: bool = True  # of shared memory; those of other generations have 99 or 163


@dataclass(frozen=True, slots=True, eq=False)
class _Launch:
    """Tiles of one shape.

    Attributes:
        tiles: [num_tiles, 4] int32: sequence, first row of the batch, number of rows, position of the first; None: one
            for each sequence of a decode step.
        tile_queries: most rows of a tile.
        num_splits: of each tile's keys, at most; fewer where they would have less than `min_split_keys`.
        partial_out: [num_splits, num_tiles * tile_queries, H, Dv] float32, and partial_log without Dv: results of
            splits; empty where there is one.
    """

    shape: TileShape
    tiles: Tensor | None
    num_tiles: int
    tile_queries: int
    num_splits: int
    min_split_keys: int
    partial_out: Tensor
    partial_log: Tensor


def paged_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    metadata: AttentionMetadata,
    params: AttentionParams,
    shapes: tuple[TileShape, TileShape] | None = None,
) -> Tensor:
    """See functional.py. -> [T, H, Dv]

    Args:
        shapes: of tiles with few and with many rows, for all layers of the step; None: those that suit the device.
    """
    assert query.stride(2) == 1
    assert key_cache.is_contiguous()
    assert value_cache.is_contiguous()
    assert params.scale > 0
    num_tokens, num_heads, _ = query.shape
    out = torch.empty(num_tokens, num_heads, value_cache.shape[3], dtype=query.dtype, device=query.device)
    for launch in _plan(query, key_cache, value_cache, metadata, params, shapes):
        with torch.cuda.device(query.get_device()):
            _run(launch, query, key_cache, value_cache, out, metadata, params)
    return out


def write_kv(key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor) -> None:
    """See functional.py."""
    num_tokens, num_kv_heads, key_dim = key.shape
    value_dim = value.shape[2]
    assert key.stride(2) == value.stride(2) == 1
    assert key_cache.is_contiguous()
    assert value_cache.is_contiguous()
    with torch.cuda.device(key.get_device()):
        write_kernel[(num_tokens, -(-num_kv_heads * max(key_dim, value_dim) // _WRITE_BLOCK))](
            key,
            value,
            key_cache,
            value_cache,
            slot_mapping,
            key.stride(0),
            key.stride(1),
            value.stride(0),
            value.stride(1),
            NUM_KV_HEADS=num_kv_heads,
            KEY_DIM=key_dim,
            VALUE_DIM=value_dim,
            BLOCK=_WRITE_BLOCK,
        )


def _run(
    launch: _Launch,
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    out: Tensor,
    metadata: AttentionMetadata,
    params: AttentionParams,
) -> None:
    _, num_heads, key_dim = query.shape
    _, block_size, num_kv_heads, value_dim = value_cache.shape
    shape = launch.shape
    seq_lens = None if launch.tiles is not None else _device_seq_lens(metadata)
    block_value_dim = _block_dim(value_dim)
    limits = {"TILE_KEYS": shape.tile_keys, "WINDOW": params.sliding_window, "CHUNK": params.chunk_size}
    attend_kernel[(num_kv_heads, launch.num_tiles, launch.num_splits)](
        query,
        key_cache,
        value_cache,
        metadata.block_tables,
        seq_lens,
        launch.tiles,
        params.sinks,
        None if params.alibi is None else params.alibi.slopes,
        out,
        launch.partial_out,
        launch.partial_log,
        params.scale,
        params.softcap,
        None if params.alibi is None else params.alibi.multiplier,
        query.stride(0),
        query.stride(1),
        metadata.block_tables.stride(0),
        launch.num_splits,
        launch.min_split_keys,
        launch.tile_queries,
        NUM_KV_HEADS=num_kv_heads,
        NUM_SHARED=num_heads // num_kv_heads,
        BLOCK_SIZE=block_size,
        KEY_DIM=key_dim,
        VALUE_DIM=value_dim,
        BLOCK_KEY_DIM=_block_dim(key_dim),
        BLOCK_VALUE_DIM=block_value_dim,
        TILE_ROWS=shape.tile_rows,
        **limits,
        PRODUCT_DTYPE=_product_dtype(query, key_cache),
        PRECISION="tf32x3" if query.dtype == torch.float32 else "tf32",
        num_warps=shape.num_warps,
        num_stages=shape.num_stages,
    )
    if launch.num_splits == 1:
        return
    merge_kernel[(num_heads, launch.num_tiles * launch.tile_queries)](
        launch.partial_out,
        launch.partial_log,
        out,
        seq_lens,
        launch.tiles,
        launch.num_splits,
        launch.min_split_keys,
        launch.tile_queries,
        launch.num_tiles * launch.tile_queries,
        NUM_HEADS=num_heads,
        VALUE_DIM=value_dim,
        BLOCK_VALUE_DIM=block_value_dim,
        BLOCK_SPLITS=_MAX_SPLITS,
        **limits,
    )


def _product_dtype(query: Tensor, key_cache: Tensor) -> tl.dtype:
    """What is multiplied. float16 holds float8 as it is, and one instruction widens two of them to it; to bfloat16 each
    number takes four."""
    if not query.is_cuda:
        return tl.float32  # the interpreter has no bfloat16
    is_half = query.dtype.itemsize == 2 and key_cache.dtype == torch.float8_e4m3fn
    return tl.float16 if is_half else _PRODUCT_DTYPES[query.dtype]


def _plan(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    metadata: AttentionMetadata,
    params: AttentionParams,
    shapes: tuple[TileShape, TileShape] | None,
) -> tuple[_Launch, ...]:
    """How this step is computed by layers of these shapes that see as much."""
    key = ("triton", query.shape[1], key_cache.shape[2:], value_cache.shape[3], params.visibility)
    plan: tuple[_Launch, ...] | None = metadata.plans.get(key)
    if plan is None:
        shapes = shapes or suitable_shapes(query, key_cache, value_cache)
        plan = metadata.plans[key] = tuple(_make_plan(query, key_cache, value_cache, metadata, params, shapes))
    return plan


def suitable_shapes(query: Tensor, key_cache: Tensor, value_cache: Tensor) -> tuple[TileShape, TileShape]:
    """Of tiles with few and with many rows: what was measured on the device, or else the defaults."""
    num_shared = query.shape[1] // key_cache.shape[2]
    head_dim = max(key_cache.shape[3], value_cache.shape[3])
    shapes = tile_shapes(num_shared, head_dim, query.dtype, has_227_kib=_gpu(query.device).has_227_kib)
    table = _table(query.device)
    return tuned_shapes(shapes, table, num_shared=num_shared, head_dim=head_dim, kv_dtype=key_cache.dtype)


@cache  # a file that is part of the package
def _table(device: torch.device) -> TunedTable:
    return table_of(device)


def _make_plan(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    metadata: AttentionMetadata,
    params: AttentionParams,
    shapes: tuple[TileShape, TileShape],
) -> Iterable[_Launch]:
    num_heads = query.shape[1]
    num_kv_heads, value_dim = value_cache.shape[2:]
    gpu = _gpu(query.device)
    visible = metadata.block_tables.shape[1] * key_cache.shape[1]
    visible = min(limit for limit in (visible, params.sliding_window, params.chunk_size) if limit is not None)

    def launch(shape: TileShape, tiles: Tensor | None, num_tiles: int, tile_queries: int) -> _Launch:
        num_splits, min_split_keys = _splits(num_tiles * num_kv_heads, visible + tile_queries - 1, shape, gpu)
        lead = (num_splits if num_splits > 1 else 0, num_tiles * tile_queries, num_heads)
        partial_out = torch.empty(*lead, value_dim, dtype=torch.float32, device=query.device)
        partial_log = torch.empty(lead, dtype=torch.float32, device=query.device)
        return _Launch(shape, tiles, num_tiles, tile_queries, num_splits, min_split_keys, partial_out, partial_log)

    if metadata.is_decode:
        yield launch(shapes[0], None, metadata.num_sequences, 1)
        return
    remaining = list(range(metadata.num_sequences))
    for shape in shapes:
        mine = [s for s in remaining if shape.takes(metadata.query_len(s))]
        remaining = [s for s in remaining if not shape.takes(metadata.query_len(s))]
        if mine:
            tiles = [tile for s in mine for tile in _tiles(metadata, s, shape.tile_queries)]
            tiles.sort(key=lambda tile: -tile[3])  # those with most keys first: the last to end should be short
            table = to_device(torch.tensor(tiles, dtype=torch.int32), query.device)
            yield launch(shape, table, len(tiles), max(tile[2] for tile in tiles))


def _tiles(metadata: AttentionMetadata, sequence: int, tile_queries: int) -> list[tuple[int, int, int, int]]:
    start, end = metadata.query_start[sequence : sequence + 2]
    first_position = metadata.seq_lens[sequence] - (end - start)
    return [
        (sequence, first, min(tile_queries, end - first), first_position + first - start)
        for first in range(start, end, tile_queries)
    ]


def _splits(num_programs: int, num_keys: int, shape: TileShape, gpu: _Gpu) -> tuple[int, int]:
    """How many splits of the keys, a power of 2, and the least keys of one.

    Where programs are fewer than multiprocessors every tile of keys may be a split; where they are enough, only long
    contexts are split, so that none of them keeps one program busy when all others have ended.
    """
    min_keys = shape.min_split_keys if num_programs < gpu.num_multiprocessors else _MANY_SPLIT_KEYS
    wanted = -(-gpu.num_multiprocessors * shape.programs_per_multiprocessor // num_programs)
    most = _power_of_two(-(-num_keys // min_keys))
    return min(_power_of_two(wanted), most, _MAX_SPLITS), min_keys


def _gpu(device: torch.device) -> _Gpu:
    if device.type != "cuda":
        return _Gpu()
    properties = torch.cuda.get_device_properties(device)
    return _Gpu(properties.multi_processor_count, properties.major in (9, 10))


def _device_seq_lens(metadata: AttentionMetadata) -> Tensor:
    if metadata.device_seq_lens is not None:
        return metadata.device_seq_lens
    key = ("triton", "seq_lens")
    seq_lens: Tensor | None = metadata.plans.get(key)
    if seq_lens is None:
        lengths = torch.tensor(metadata.seq_lens, dtype=torch.int32)
        seq_lens = metadata.plans[key] = to_device(lengths, metadata.block_tables.device)
    return seq_lens


def _block_dim(head_dim: int) -> int:
    return max(_power_of_two(head_dim), 16)  # the least that tensor cores multiply


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()

"""The tiles that the kernel of paged attention computes, by what a GPU has room for.

The defaults are for Hopper (227 KiB of shared memory and 65,536 registers a multiprocessor), by calculation; what was
measured (`python -m model_worker.engine.ops.tuning`) goes before them.
Decoding is limited by memory: a few programs a multiprocessor have some 100 KiB of keys and values under way. Prompts
are limited by the tensor cores, whose widest instruction takes 64 rows for each four warps. Tiles of float32, which is
there for exactness, are small.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from model_worker.engine.ops.tuning.tuned_table import TunedTable

OP = "paged_attention"
TUNED = ("tile_keys", "num_warps", "num_stages", "programs_per_multiprocessor")
"""What a table may say of a shape."""

_FEW_ROWS = 16  # the least that tensor cores multiply


@dataclass(frozen=True, slots=True)
class TileShape:
    """What a program computes at once.

    Attributes:
        tile_rows: rows, (query token, head) pairs; a power of 2.
        tile_queries: query tokens of these, at most.
        tile_keys: keys that are multiplied at once.
        whole: only sequences whose whole query is one tile.
        programs_per_multiprocessor: so many are wanted before the context is no longer split.
        min_split_keys: a split of less is not worth its merging, even where multiprocessors have nothing to do.
    """

    tile_rows: int
    tile_queries: int
    tile_keys: int
    num_warps: int
    num_stages: int
    whole: bool
    programs_per_multiprocessor: int
    min_split_keys: int

    def takes(self, query_len: int) -> bool:
        """Whether a sequence with so many tokens in the batch is computed in tiles of this shape."""
        return not self.whole or query_len <= self.tile_queries


def tile_shapes(
    num_shared: int, head_dim: int, dtype: torch.dtype, *, has_227_kib: bool
) -> tuple[TileShape, TileShape]:
    """That of sequences with few rows, such as in decoding, and that of the others.

    Args:
        num_shared: query heads that share a KV head.
        head_dim: the larger one of keys and values.
        dtype: of the query.
        has_227_kib: of shared memory a multiprocessor.
    """
    num_bytes = dtype.itemsize * (1 << (head_dim - 1).bit_length())  # of a key
    few = max(_FEW_ROWS, 1 << (num_shared - 1).bit_length())
    is_wide = head_dim > 128
    if dtype.itemsize == 2:
        many = max(few, 64 if is_wide and not has_227_kib else 128)
    else:
        many = max(few, 16 if is_wide else 32)
    keys = 64 if num_bytes <= 256 else 32 if num_bytes <= 512 else 16
    # Block tables, and keys and values behind them, are read ahead: with 5 stages two tiles of keys, with 3 one.
    stages = (5 if has_227_kib else 3) if dtype.itemsize == 2 else 2
    return (
        TileShape(few, few // num_shared, keys, _num_warps(few), stages, True, 6, keys),
        TileShape(many, many // num_shared, keys, _num_warps(many), stages, False, 1, 8 * keys),
    )


def _num_warps(tile_rows: int) -> int:
    """With fewer, the registers of 128 rows would not do."""
    return 8 if tile_rows >= 128 else 4


def tuned_shapes(
    shapes: tuple[TileShape, TileShape], table: TunedTable, *, num_shared: int, head_dim: int, kv_dtype: torch.dtype
) -> tuple[TileShape, TileShape]:
    """Those shapes with what was measured on the device, if anything was."""
    few, many = shapes
    return (
        with_choice(few, table.find(OP, shape_class(few, num_shared, head_dim, kv_dtype)) or {}),
        with_choice(many, table.find(OP, shape_class(many, num_shared, head_dim, kv_dtype)) or {}),
    )


def with_choice(shape: TileShape, choice: Mapping[str, int]) -> TileShape:
    """The shape with some of the numbers named in `TUNED` chosen otherwise."""
    return replace(
        shape,
        tile_keys=choice.get("tile_keys", shape.tile_keys),
        num_warps=choice.get("num_warps", shape.num_warps),
        num_stages=choice.get("num_stages", shape.num_stages),
        programs_per_multiprocessor=choice.get("programs_per_multiprocessor", shape.programs_per_multiprocessor),
    )


def shape_class(shape: TileShape, num_shared: int, head_dim: int, kv_dtype: torch.dtype) -> str:
    """Under which a table has a shape."""
    kind = "few rows" if shape.whole else "many rows"
    return f"{kind}, {num_shared} heads share {head_dim} numbers of {8 * kv_dtype.itemsize} bits"

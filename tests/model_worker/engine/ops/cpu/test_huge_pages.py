"""Pieces of an arena are aligned, apart from each other, and alive as long as somebody holds them."""

from __future__ import annotations

import gc
import mmap
import random

import pytest
import torch

from model_worker.engine.ops.cpu.huge_pages import HugePageArena


def test_pieces_of_all_sizes_keep_what_is_written_to_them() -> None:
    rng = random.Random(1)
    arena = HugePageArena()
    pieces = [arena.empty(size) for size in [0, 1, 63, 64, 65, *(rng.randrange(1, 3 << 20) for _ in range(60))]]
    for index, piece in enumerate(pieces):
        piece.fill_(index)
    assert all(piece.data_ptr() % 64 == 0 for piece in pieces if len(piece))
    assert all(bool((piece == index).all()) for index, piece in enumerate(pieces))


def test_a_piece_may_be_larger_than_a_chunk() -> None:
    arena = HugePageArena()
    before, large, after = arena.empty(10), arena.empty(100 << 20), arena.empty(10)
    for index, piece in enumerate((before, large, after)):
        piece.fill_(index)
    assert (int(before[-1]), int(large[0]), int(large[-1]), int(after[0])) == (0, 1, 1, 2)


def test_keeping_copies() -> None:
    data = torch.arange(100, dtype=torch.uint8)
    kept = HugePageArena().keep(data)
    data.zero_()
    assert kept.tolist() == list(range(100))


def test_a_piece_outlives_its_arena() -> None:
    kept = HugePageArena().keep(torch.full((5 << 20,), 7, dtype=torch.uint8))
    gc.collect()
    assert bool((kept == 7).all())


def test_ordinary_memory_serves_where_there_are_no_huge_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    kept = HugePageArena().keep(torch.full((5,), 3, dtype=torch.uint8))
    assert kept.tolist() == [3] * 5

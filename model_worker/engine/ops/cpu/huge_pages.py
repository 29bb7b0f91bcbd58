"""Memory on huge pages, for what a step reads from end to end.

With pages of 4 KiB the processor asks for an address translation every 64 cache lines, under a hypervisor a nested
one; with pages of 2 MiB two threads read packed weights about a tenth faster (benchmarks/LOG.md).
"""

from __future__ import annotations

import contextlib
import mmap

import torch
from torch import Tensor

_HUGE_PAGE_BYTES = 2 * 1024 * 1024
_CHUNK_BYTES = 32 * _HUGE_PAGE_BYTES
_ALIGNMENT = 64  # a cache line


class HugePageArena:
    """Hands out memory that is never taken back one by one: it is freed with the last tensor of its chunk.

    Pieces lie one after the other, so that only the end of the last huge page is wasted. Where the system has no huge
    pages, this is ordinary memory.
    """

    def __init__(self) -> None:
        self._chunk = torch.empty(0, dtype=torch.uint8)
        self._used_bytes = 0

    def empty(self, num_bytes: int) -> Tensor:
        """Memory of its own, aligned to a cache line. -> [num_bytes] uint8, with any content"""
        start = -(-self._used_bytes // _ALIGNMENT) * _ALIGNMENT
        if start + num_bytes > self._chunk.numel():
            self._chunk = map_huge_pages(max(num_bytes, _CHUNK_BYTES))
            start = 0
        self._used_bytes = start + num_bytes
        return self._chunk[start : self._used_bytes]

    def keep(self, data: Tensor) -> Tensor:
        """A copy of data [n] uint8 in this memory."""
        kept = self.empty(data.numel())
        kept.copy_(data)
        return kept


def map_huge_pages(num_bytes: int) -> Tensor:
    """Memory of its own, on huge pages where the system has them. -> [num_bytes] uint8, zeros or any content"""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(num_bytes, dtype=torch.uint8)
    # One huge page more than needed, which is never touched, to begin on the border of one.
    memory = mmap.mmap(-1, num_bytes + _HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    start = -whole.data_ptr() % _HUGE_PAGE_BYTES
    num_whole = num_bytes // _HUGE_PAGE_BYTES  # the rest is on ordinary pages: little memory takes no huge page
    if num_whole > 0:
        with contextlib.suppress(OSError):  # a kernel without huge pages: ordinary ones serve
            memory.madvise(mmap.MADV_HUGEPAGE, start, num_whole * _HUGE_PAGE_BYTES)
    return whole[start : start + num_bytes]

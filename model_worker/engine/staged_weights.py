"""Weights of a checkpoint on their way to a GPU: read by several threads into pinned memory, copied from there.

    mapped file ──threads, a piece each──► slots of pinned memory ──copies, in order──► a tensor of the device

Pieces go through the slots in a ring, so that while some are copied to the device others are read from the files, those
of the same tensor and of the next ones. Of a part of a tensor, such as some columns, only that part is read. Beside the
slots, host memory holds nothing but blocks of a GGUF file; the device holds each tensor once more until it is in its
place.

Reading is copying from the mapped file: as fast as `pread` into the slot, and for columns faster (benchmarks/LOG.md).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

from compression.grouped_weight import GroupedWeight

Weight = Tensor | GroupedWeight

_NUM_THREADS = 8
_NUM_SLOTS = 16
_SLOT_BYTES = 32 * 2**20


def stage_weights(
    weights: Iterable[tuple[str, Weight]],
    device: torch.device,
    *,
    num_slots: int = _NUM_SLOTS,
    slot_bytes: int = _SLOT_BYTES,
) -> Iterator[tuple[str, Weight]]:
    """The same weights on the device, in the same order and dtypes. Blocks of a GGUF file stay in host memory:
    who takes them puts the parts of a matrix together there, and then sends it without staging.

    Args:
        weights: may be mapped from files.
        num_slots, slot_bytes: of the pinned memory.
    """
    with ThreadPoolExecutor(_NUM_THREADS, "read-weights") as pool:
        ring = _Ring(pool, device, num_slots, slot_bytes)
        under_way: deque[_UnderWay] = deque()
        for name, weight in weights:
            staged = ring.stage(weight) if isinstance(weight, Tensor) else weight
            under_way.append(_UnderWay(name, staged, ring.num_read))
            while under_way and under_way[0].last_piece <= ring.num_copied:
                yield under_way.popleft()[:2]
        while under_way:
            while ring.num_copied < under_way[0].last_piece:
                ring.copy_next()
            yield under_way.popleft()[:2]


class _UnderWay(NamedTuple):
    """A weight, complete when the copies of so many pieces are launched."""

    name: str
    staged: Weight
    last_piece: int


class _Piece(NamedTuple):
    """Being read into the slot."""

    reading: Future[Tensor]
    slot: _Slot
    target: Tensor


class _Slot:
    """Pinned memory; on CPUs, for tests, any."""

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        on_gpu = device.type == "cuda"
        self._device = device
        self._memory = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=on_gpu)
        self._copied = torch.cuda.Event() if on_gpu else None  # type: ignore[no-untyped-call]

    def view(self, like: Tensor) -> Tensor:
        return self._memory[: like.nbytes].view(like.dtype).view(like.shape)

    def wait(self) -> None:
        """Until it can be written again."""
        if self._copied is not None:
            self._copied.synchronize()

    def copy_to(self, target: Tensor) -> None:
        """Launch the copy."""
        target.copy_(self.view(target), non_blocking=True)
        if self._copied is not None:
            self._copied.record(torch.cuda.current_stream(self._device))


class _Ring:
    """Slots, used in turn.

    Attributes:
        num_read: pieces that are read, or will be.
        num_copied: of them, those whose copy is launched.
    """

    def __init__(self, pool: ThreadPoolExecutor, device: torch.device, num_slots: int, slot_bytes: int) -> None:
        self._pool = pool
        self._device = device
        self._num_slots = num_slots
        self._slot_bytes = slot_bytes
        self._slots: list[_Slot] = []
        self._pieces: deque[_Piece] = deque()
        self.num_read = 0
        self.num_copied = 0

    def stage(self, tensor: Tensor) -> Tensor:
        """A tensor on the device that is complete when all pieces until now are copied."""
        staged = torch.empty(tensor.shape, dtype=tensor.dtype, device=self._device)
        for source, target in _pieces(tensor, staged, self._slot_bytes // tensor.element_size()):
            if len(self._pieces) == self._num_slots:
                self.copy_next()
            slot = self._next_slot()
            self._pieces.append(_Piece(self._pool.submit(slot.view(source).copy_, source), slot, target))
            self.num_read += 1
        return staged

    def copy_next(self) -> None:
        """Wait for the oldest piece, and launch its copy."""
        reading, slot, target = self._pieces.popleft()
        reading.result()
        slot.copy_to(target)
        self.num_copied += 1

    def _next_slot(self) -> _Slot:
        if len(self._slots) < self._num_slots:
            self._slots.append(_Slot(self._slot_bytes, self._device))
            return self._slots[-1]
        slot = self._slots[self.num_read % self._num_slots]
        slot.wait()
        return slot


def _pieces(source: Tensor, target: Tensor, most: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Parts of both of at most so many numbers, in the order of the memory of `target`, which is contiguous."""
    if source.is_contiguous():
        yield from zip(torch.split(source.view(-1), most), torch.split(target.view(-1), most), strict=True)
        return
    num_rows = most // source[0].numel()
    if num_rows > 0:
        yield from zip(torch.split(source, num_rows), torch.split(target, num_rows), strict=True)
        return
    for row, target_row in zip(source, target, strict=True):
        yield from _pieces(row, target_row, most)

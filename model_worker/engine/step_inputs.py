"""The numbers of a StepBatch as tensors of the device that computes it.

    CPU    the arrays themselves
    GPU    arrays ──► one of two pinned buffers ──one copy, not waited for──► a buffer on the device, of which the
           tensors are views

Batches of one shape find their numbers at the same addresses, whatever the width of their block tables, so that a
captured graph can be replayed with those of another step. A shape may have more rows than the batch: it is filled up
with rows of length 0, which are written to no slot.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from model_worker.engine.step_batch import StepBatch

_ALIGNMENT = 16  # bytes
_NO_SLOT = -1
_NOT_PENDING = -1
_DTYPES: dict[type[np.generic], torch.dtype] = {np.int64: torch.int64, np.int32: torch.int32}


class StepTensors(NamedTuple):
    """See StepBatch; T tokens, S sequences, G layer groups, R rows with logits.

    Attributes:
        input_ids: [T] int64
        positions: [T] int64
        slot_mapping: [G, T] int64
        seq_lens: [S] int32; None: who computes on the host has them in the batch.
        logit_rows: [R] int64
        sources: [T] int32, the sample of the step before that is this token; -1: the token is in `input_ids`. None: so
            it is for all.
        block_tables: [G, S, max_blocks] int32
    """

    input_ids: Tensor
    positions: Tensor
    slot_mapping: Tensor
    seq_lens: Tensor | None
    logit_rows: Tensor
    sources: Tensor | None
    block_tables: Tensor

    def known_input_ids(self, drawn: Tensor) -> Tensor:
        """The token ids of the batch, with those that were pending. drawn [samples] int64 -> [T] int64"""
        if self.sources is None:
            return self.input_ids
        return torch.where(self.sources >= 0, drawn[self.sources.clamp(min=0)], self.input_ids)


class StepInputs(Protocol):
    """Brings batches to a device."""

    def load(self, batch: StepBatch) -> StepTensors:
        """The tensors of a batch, until the next call; what was launched before reads those of its own batch."""
        ...


class HostInputs:
    """For CPUs: nothing is copied. No token is pending where steps are computed one after the other."""

    def load(self, batch: StepBatch) -> StepTensors:
        assert not batch.pending
        return StepTensors(
            torch.from_numpy(batch.input_ids),
            torch.from_numpy(batch.positions),
            torch.from_numpy(batch.slot_mapping),
            None,
            torch.from_numpy(batch.logit_rows),
            None,
            torch.from_numpy(batch.block_tables),
        )


@dataclass(frozen=True, slots=True)
class BatchShape:
    """Sizes of the arrays of a batch."""

    num_groups: int
    num_tokens: int
    num_sequences: int
    max_blocks: int
    num_logit_rows: int

    @classmethod
    def of(cls, batch: StepBatch) -> BatchShape:
        num_groups, num_sequences, max_blocks = batch.block_tables.shape
        return cls(num_groups, batch.num_tokens, num_sequences, max_blocks, len(batch.logit_rows))

    @property
    def num_bytes(self) -> int:
        return sum(_num_bytes(dtype, shape) for dtype, shape in self.arrays())

    def arrays(self) -> Iterator[tuple[type[np.generic], tuple[int, ...]]]:
        """Types and shapes, in the order of the fields of StepTensors."""
        yield np.int64, (self.num_tokens,)
        yield np.int64, (self.num_tokens,)
        yield np.int64, (self.num_groups, self.num_tokens)
        yield np.int32, (self.num_sequences,)
        yield np.int64, (self.num_logit_rows,)
        yield np.int32, (self.num_tokens,)
        yield np.int32, (self.num_groups, self.num_sequences, self.max_blocks)


class DeviceInputs:
    """For GPUs; with a CPU as the device it does the same, for tests.

    Args:
        num_bytes: of the largest shape that will come.
    """

    def __init__(self, device: torch.device, num_bytes: int) -> None:
        self._on_gpu = device.type == "cuda"
        self._device_buffer = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
        self._host_buffers = [torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=self._on_gpu) for _ in range(2)]
        # A buffer is written again when the copy from it, two steps ago, is done.
        self._copied = [_event() for _ in range(2)] if self._on_gpu else []
        self._turn = 0
        self._last: _Views | None = None  # decode steps that follow each other mostly have one shape

    def load(self, batch: StepBatch, *, num_rows: int | None = None) -> StepTensors:
        """See StepInputs.

        Args:
            num_rows: fill a batch of as many tokens as sequences up to so many, and leave `logit_rows` out.
        """
        shape = BatchShape.of(batch)
        if num_rows is not None:
            shape = BatchShape(shape.num_groups, num_rows, num_rows, shape.max_blocks, 0)
        if self._last is None or self._last.shape != shape:
            on_host = tuple(_host_views(shape, buffer.numpy()) for buffer in self._host_buffers)
            self._last = _Views(shape, on_host, self.tensors(shape))
        self._turn = 1 - self._turn
        if self._on_gpu:
            self._copied[self._turn].synchronize()
        _write(batch, self._last.on_host[self._turn])
        num_bytes = shape.num_bytes
        self._device_buffer[:num_bytes].copy_(self._host_buffers[self._turn][:num_bytes], non_blocking=True)
        if self._on_gpu:
            self._copied[self._turn].record()
        return self._last.tensors

    def tensors(self, shape: BatchShape) -> StepTensors:
        """Views of the buffer on the device; but for the block tables they are where those of any other width are."""
        views = []
        first = 0
        for dtype, size in shape.arrays():
            num_bytes = math.prod(size) * np.dtype(dtype).itemsize
            views.append(self._device_buffer[first : first + num_bytes].view(_DTYPES[dtype]).view(size))
            first += _num_bytes(dtype, size)
        return StepTensors(*views)


@dataclass(frozen=True, slots=True, eq=False)
class _Views:
    """Of batches of one shape.

    Attributes:
        on_host: of each buffer, in the order of the fields of StepTensors.
    """

    shape: BatchShape
    on_host: tuple[list[npt.NDArray[Any]], ...]
    tensors: StepTensors


def _event() -> torch.cuda.Event:
    return torch.cuda.Event()  # type: ignore[no-untyped-call]


def _host_views(shape: BatchShape, buffer: npt.NDArray[np.uint8]) -> list[npt.NDArray[Any]]:
    views = []
    first = 0
    for dtype, size in shape.arrays():
        num_bytes = math.prod(size) * np.dtype(dtype).itemsize
        views.append(buffer[first : first + num_bytes].view(dtype).reshape(size))
        first += _num_bytes(dtype, size)
    return views


def _write(batch: StepBatch, views: list[npt.NDArray[Any]]) -> None:
    """Block tables are not filled up: nobody looks at rows of length 0, or at entries past the end of a sequence."""
    input_ids, positions, slots, seq_lens, logit_rows, sources, tables = views
    num_tokens, num_sequences = batch.num_tokens, batch.num_sequences
    input_ids[:num_tokens], input_ids[num_tokens:] = batch.input_ids, 0
    positions[:num_tokens], positions[num_tokens:] = batch.positions, 0
    slots[:, :num_tokens], slots[:, num_tokens:] = batch.slot_mapping, _NO_SLOT
    tables[:, :num_sequences] = batch.block_tables
    seq_lens[:num_sequences], seq_lens[num_sequences:] = batch.seq_lens, 0
    logit_rows[:] = batch.logit_rows[: len(logit_rows)]
    sources[:] = _NOT_PENDING
    for place, sample in batch.pending:
        sources[place] = sample


def _num_bytes(dtype: type[np.generic], shape: tuple[int, ...]) -> int:
    """With what is left free after it."""
    num_bytes = math.prod(shape) * np.dtype(dtype).itemsize
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT

"""A model's step as a list of operations on fixed buffers, run by a team of threads in one call.

    operations        [Embedding, RMSNorm, Linear, RotaryKV, PagedAttention, Linear, RMSNorm, Linear, ...]
    a step            the same list every time, over the first T rows of the buffers

Nothing is allocated, looked up or decided in Python between two operations, and the interpreter's lock is free while
the list runs, so event loops go on meanwhile. Each operation also says in torch what it computes (`reference`), which
is its definition, and what it costs (`bytes_moved`, `flops`), which the tracer divides by the time it took.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from model_worker.engine.ops.cpu.machine_level import MachineLevel
from model_worker.engine.ops.cpu.step_variants import StepVariants
from registry.errors import InternalError


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """The batch of one step, on the host, contiguous. T tokens of S sequences.

    Attributes:
        input_ids, positions: [T] int64.
        slot_mapping: [G, T] int64, for each layer group the slot of each token.
        block_tables: [G, S, max_blocks] int32.
        query_start: [S + 1] int64; tokens [query_start[s], query_start[s + 1]) belong to sequence s.
        seq_lens: [S] int64; tokens of the sequence up to and with those of this batch.
        variants: of the rows; None: all are the base's, and no operation looks at variants.
    """

    input_ids: Tensor
    positions: Tensor
    slot_mapping: Tensor
    block_tables: Tensor
    query_start: Tensor
    seq_lens: Tensor
    variants: StepVariants | None = None

    @classmethod
    def of_rows(cls, num_rows: int, variants: StepVariants | None = None) -> Step:
        """A step of operations that look at rows only."""
        empty = torch.empty(num_rows, dtype=torch.int64)
        none = torch.empty(0, dtype=torch.int64)
        return cls(empty, empty, empty[None], torch.empty(1, 0, 0, dtype=torch.int32), none, none, variants)

    @property
    def num_rows(self) -> int:
        return len(self.input_ids)

    @property
    def num_sequences(self) -> int:
        return len(self.seq_lens)


class Operation(Protocol):
    """One fused op on fixed buffers; a frozen dataclass in the op's folder.

    Attributes:
        kernel: name of its C++ function.
        name: of the part of the model that it computes, as in "layers.3.mlp.gate_up_proj".
    """

    @property
    def kernel(self) -> str: ...

    @property
    def name(self) -> str: ...

    def arguments(self) -> ctypes.Structure:
        """What the kernel is given. Tensors are passed as addresses: the operation must stay alive and unmoved."""
        ...

    def reference(self, step: Step) -> None:
        """The definition, in torch, in place on the same buffers."""
        ...

    def bytes_moved(self, step: Step) -> int:
        """Bytes that must be read and written at least once."""
        ...

    def flops(self, step: Step) -> int:
        """Multiplications and additions of the products; 0 where they do not matter."""
        ...


class _Step(ctypes.Structure):
    _fields_ = (
        ("num_rows", ctypes.c_int64),
        ("num_sequences", ctypes.c_int64),
        ("input_ids", ctypes.c_void_p),
        ("positions", ctypes.c_void_p),
        ("slot_mapping", ctypes.c_void_p),
        ("block_tables", ctypes.c_void_p),
        ("block_table_stride", ctypes.c_int64),
        ("query_start", ctypes.c_void_p),
        ("seq_lens", ctypes.c_void_p),
        ("variants", ctypes.c_void_p),
    )

    @classmethod
    def of(cls, step: Step) -> _Step:
        for tensor in (step.input_ids, step.positions, step.slot_mapping, step.query_start, step.seq_lens):
            assert tensor.dtype == torch.int64
        assert step.block_tables.dtype == torch.int32
        assert len(step.positions) == step.slot_mapping.shape[1] == step.num_rows
        tensors = (
            step.input_ids,
            step.positions,
            step.slot_mapping,
            step.block_tables,
            step.query_start,
            step.seq_lens,
        )
        assert all(tensor.is_contiguous() and tensor.device.type == "cpu" for tensor in tensors)
        return cls(
            step.num_rows,
            step.num_sequences,
            step.input_ids.data_ptr(),
            step.positions.data_ptr(),
            step.slot_mapping.data_ptr(),
            step.block_tables.data_ptr(),
            step.block_tables.shape[2],
            step.query_start.data_ptr(),
            step.seq_lens.data_ptr(),
            None if step.variants is None else step.variants.address,
        )


class _Command(ctypes.Structure):
    _fields_ = (("kernel", ctypes.c_void_p), ("arguments", ctypes.c_void_p))


class KernelLibrary:
    """A built library of kernels, loaded.

    Args:
        path: of the library (build.py).
        level: that it was built for.

    Raises:
        InternalError: it cannot be loaded.
    """

    def __init__(self, path: Path, level: MachineLevel) -> None:
        self.path = path
        self.level = level
        try:
            self._library = ctypes.CDLL(str(path))
        except OSError as error:
            raise InternalError(f"The CPU kernels in {path} cannot be loaded ({error}); delete the file.") from error
        self._library.rootgraft_team_create.restype = ctypes.c_void_p
        self._library.rootgraft_team_create.argtypes = (ctypes.c_int64,)
        self._library.rootgraft_team_destroy.argtypes = (ctypes.c_void_p,)
        self.run = self._library.rootgraft_team_run
        self.run.restype = None
        self.run.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p)

    def kernel(self, name: str) -> int:
        """The address of a kernel."""
        address = ctypes.cast(getattr(self._library, name), ctypes.c_void_p).value
        assert address is not None
        return address

    def create_team(self, num_threads: int) -> int:
        team: int | None = self._library.rootgraft_team_create(num_threads)
        if team is None:
            raise InternalError(f"{num_threads} threads cannot be started; lower --num-threads.")
        return team

    def destroy_team(self, team: int) -> None:
        self._library.rootgraft_team_destroy(team)


class Team:
    """Threads that run programs; the calling thread is one of them. One program at a time."""

    def __init__(self, library: KernelLibrary, num_threads: int) -> None:
        assert num_threads >= 1
        self.library = library
        self.num_threads = num_threads
        self.handle = library.create_team(num_threads)

    def __del__(self) -> None:
        if hasattr(self, "handle"):
            self.library.destroy_team(self.handle)


class Program:
    """Operations, made ready for a team."""

    def __init__(self, team: Team, operations: Sequence[Operation]) -> None:
        self.operations = tuple(operations)
        self._team = team
        self._arguments = [operation.arguments() for operation in operations]
        self._commands = (_Command * len(self.operations))(
            *(
                _Command(team.library.kernel(operation.kernel), ctypes.addressof(arguments))
                for operation, arguments in zip(self.operations, self._arguments, strict=True)
            )
        )

    def run(self, step: Step) -> None:
        """Run all operations over a step's rows. Blocks until done, without the interpreter's lock."""
        self._run(step, None)

    def time(self, step: Step) -> np.ndarray:
        """Run, and measure. -> [operations] float64, seconds that each one took."""
        ends = np.zeros(len(self.operations), dtype=np.int64)
        start = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
        self._run(step, ends.ctypes.data)
        durations: np.ndarray = np.diff(ends, prepend=start) / 1e9
        return durations

    def _run(self, step: Step, end_ns: int | None) -> None:
        described = _Step.of(step)
        self._team.library.run(
            self._team.handle,
            ctypes.addressof(self._commands),
            len(self.operations),
            ctypes.addressof(described),
            end_ns,
        )


def address(tensor: Tensor | None) -> int | None:
    """What a kernel is given for a tensor; rows must be contiguous."""
    if tensor is None:
        return None
    assert tensor.device.type == "cpu"
    assert tensor.stride(-1) == 1 or tensor.shape[-1] == 1
    return tensor.data_ptr()


def row_stride(rows: Tensor) -> int:
    """Numbers from one row of [T, width] float32 to the next."""
    assert rows.dtype == torch.float32
    assert rows.ndim == 2
    return rows.stride(0)


def new_buffer(num_rows: int, width: int) -> Tensor:
    """Rows of activations: [num_rows, width] float32."""
    return torch.zeros(num_rows, width, dtype=torch.float32)

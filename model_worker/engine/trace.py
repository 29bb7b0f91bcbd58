"""A forward pass as a list of operations: what each computed, how long it took, what it had to move."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from model_worker.engine.model_parts import OpKind

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TraceRow:
    """One operation.

    Attributes:
        layer: its layer; None: in none of them.
        name: within its layer, or within the model.
        kind: what it does.
        inputs, outputs: shapes of the tensors; a batch dimension of 1 is left out.
        dtype: of its weights; of its output where it has none.
        begin_ns: when it began, on the clock of `time.perf_counter_ns`.
        self_ns: how long it took, without the operations that it called, which have rows of their own.
        bytes_moved: bytes that had to be read and written at least once: weights, inputs, outputs, keys and values.
        weight_bytes: those of them that are weights.
        flops: of matrix products and attention, a multiplication and its addition counted as two.
    """

    layer: int | None
    name: str
    kind: OpKind
    inputs: tuple[Shape, ...]
    outputs: tuple[Shape, ...]
    dtype: str
    begin_ns: int
    self_ns: int
    bytes_moved: int = 0
    weight_bytes: int = 0
    flops: int = 0


class Traceable(Protocol):
    """A model that can say what its operations do."""

    def trace(self) -> AbstractContextManager[list[TraceRow]]:
        """While it is open, every operation of the model adds its row to the list, in the order in which they end.

        Tracing takes time; what it takes is in no row.
        """
        ...

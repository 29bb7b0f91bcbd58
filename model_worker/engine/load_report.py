"""What loading did with the files and tensors of a checkpoint; filled by the loader, read by `inspect`."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TypeVar

T = TypeVar("T")


class Outcome(StrEnum):
    """What became of one tensor."""

    FILLED = "filled"  # a weight of its own
    FUSED = "fused"  # a part of a larger weight
    TIED = "tied"  # compared with the weight that it is a second copy of, and not kept
    IGNORED = "ignored"  # not read: computed instead


@dataclass(frozen=True, slots=True)
class TensorReport:
    """One tensor of the checkpoint.

    Attributes:
        name: as `adapters.weights` gives it.
        outcome: what became of it.
        weight: the model's weight that it is, or is a part of; None: ignored.
        num_bytes: as it was read (GGUF: dequantized).
    """

    name: str
    outcome: Outcome
    weight: str | None
    num_bytes: int


@dataclass(slots=True)
class LoadReport:
    """One load.

    Attributes:
        tensors: all that the reader gave, in its order.
        ties: weights of the model that are others, by name; no tensor of the checkpoint is needed for them.
        seconds: time by phase: build, read, fill, finish. A mapped file is read from the disk while weights are filled.
    """

    tensors: list[TensorReport] = field(default_factory=list)
    ties: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def add(self, name: str, outcome: Outcome, weight: str | None, num_bytes: int) -> None:
        self.tensors.append(TensorReport(name, outcome, weight, num_bytes))

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time of the block as that of a phase."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begin

    def timed(self, name: str, items: Iterator[T]) -> Iterator[T]:
        """`items`, with the time that getting each of them takes counted as that of a phase."""
        while True:
            with self.phase(name):
                try:
                    item = next(items)
                except StopIteration:
                    return
            yield item

"""Sequences in the order in which they are served. Pure Python; no torch."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from operator import attrgetter

from model_worker.engine.sequence import Sequence

rank = attrgetter("rank")


class SequenceQueue:
    """A sorted set of sequences: by priority, then by arrival. A change costs O(log n) comparisons."""

    __slots__ = ("_sequences",)

    def __init__(self) -> None:
        self._sequences: list[Sequence] = []

    @property
    def first(self) -> Sequence:
        return self._sequences[0]

    @property
    def last(self) -> Sequence:
        return self._sequences[-1]

    def add(self, sequence: Sequence) -> None:
        insort(self._sequences, sequence, key=rank)

    def remove(self, sequence: Sequence) -> None:
        position = bisect_left(self._sequences, sequence.rank, key=rank)
        assert self._sequences[position] is sequence
        del self._sequences[position]

    def snapshot(self) -> list[Sequence]:
        """A copy to walk along while the queue changes."""
        return self._sequences.copy()

    def check_integrity(self) -> None:
        """Raises AssertionError: somebody is not in order."""
        ranks = [sequence.rank for sequence in self._sequences]
        assert ranks == sorted(ranks)

    def __len__(self) -> int:
        return len(self._sequences)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._sequences)

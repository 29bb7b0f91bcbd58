"""The sequences that wait to run, and which of them may. Pure Python; no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice, takewhile

from model_worker.engine.lora.variant_gate import VariantGate
from model_worker.engine.queue_pace import QueuePace
from model_worker.engine.sequence import Sequence, SequenceStatus
from model_worker.engine.sequence_queue import SequenceQueue


class WaitingRoom(SequenceQueue):
    """Sequences in the order of service, swapped ones too.

    Args:
        gate: says whose variant is active.
    """

    def __init__(self, gate: VariantGate, clock: Callable[[], float]) -> None:
        super().__init__()
        self._gate = gate
        self._pace = QueuePace(clock)

    def add(self, sequence: Sequence) -> None:
        """It is new, or has been preempted."""
        if not self:
            self._pace.queue_begins()
        super().add(sequence)
        self._gate.wait(sequence)

    def start(self, sequence: Sequence) -> None:
        """It runs from now on."""
        self.remove(sequence)
        self._pace.one_starts()

    def refuse(self) -> float:
        """Nobody more may wait. -> seconds after which it may be otherwise"""
        return self._pace.refuse()

    def admissible(self) -> Iterator[Sequence]:
        """In order, without those whose variant is not active."""
        return filter(self._gate.admits, self)

    def shortest(self, first: Sequence, *, among: int) -> Sequence:
        """Of so many admissible ones of the first one's priority; the oldest where several are equally short."""
        best = takewhile(lambda s: s.priority == first.priority, islice(self.admissible(), among))
        return min(best, key=lambda s: s.num_tokens - s.num_computed_tokens)

    def first_in_turn(self, *, somebody_runs: bool) -> Sequence | None:
        """The first that waits, without those that others may pass; None: there is no such one."""
        for sequence in self:
            if self._gate.admits(sequence):
                return sequence
            if somebody_runs and self._gate.holds_up(sequence):
                return sequence
        return None

    def swapped(self) -> list[Sequence]:
        """Those that hold blocks in host memory."""
        return [sequence for sequence in self if sequence.status is SequenceStatus.SWAPPED]

    def check_integrity(self) -> None:
        """Raises AssertionError: somebody is not in order, does not wait, or holds what nobody knows of."""
        super().check_integrity()
        unheld = [sequence for sequence in self if sequence.status is SequenceStatus.WAITING]
        assert len(unheld) + len(self.swapped()) == len(self)
        assert all(not any(s.block_tables) and s.num_computed_tokens == 0 for s in unheld)

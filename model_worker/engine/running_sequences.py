"""The sequences that run, and the places that they take in a step. Pure Python; no torch."""

from __future__ import annotations

from model_worker.engine.sequence import Sequence, SequenceGroup
from model_worker.engine.sequence_queue import SequenceQueue


class RunningSequences(SequenceQueue):
    """A queue of which each sequence takes a place; a prompt keeps as many as its request wants choices.

    Args:
        max_num_seqs: all places.

    Attributes:
        num_free_slots: places that nobody has.
    """

    __slots__ = ("_max_num_seqs", "num_free_slots")

    def __init__(self, max_num_seqs: int) -> None:
        super().__init__()
        self._max_num_seqs = max_num_seqs
        self.num_free_slots = max_num_seqs

    def add(self, sequence: Sequence) -> None:
        super().add(sequence)
        self.num_free_slots -= num_slots(sequence)

    def remove(self, sequence: Sequence) -> None:
        super().remove(sequence)
        self.num_free_slots += num_slots(sequence)

    def fork(self, group: SequenceGroup) -> None:
        """The prompt of a running request is computed: its other choices take the places that it kept for them."""
        group.forked = True
        self.num_free_slots += len(group.sequences) - 1
        for sequence in group.sequences[1:]:
            self.add(sequence)

    def check_integrity(self) -> None:
        """Raises AssertionError: somebody is not in order, or a place leaked or is taken twice."""
        super().check_integrity()
        assert self.num_free_slots == self._max_num_seqs - sum(map(num_slots, self)) >= 0


def num_slots(sequence: Sequence) -> int:
    """The places that a sequence takes when it runs."""
    group = sequence.group
    assert group is not None
    return 1 if group.forked else len(group.sequences)

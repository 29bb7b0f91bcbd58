"""A step while it is being put together. Pure Python; no torch."""

from __future__ import annotations

from model_worker.engine.block_manager import BlockCopies
from model_worker.engine.sequence import Sequence
from model_worker.engine.step import ScheduledSequence, SchedulerOutput


class StepInProgress:
    """The fields of SchedulerOutput, and what is decided on the way.

    Attributes:
        ahead: the step before is still being computed.
        left_out: somebody lacks blocks and is left out.
        preempted: somebody was preempted.
    """

    __slots__ = ("ahead", "block_copies", "left_out", "preempted", "scheduled", "swap_in", "swap_out", "swapped")

    def __init__(self, *, ahead: bool) -> None:
        self.ahead = ahead
        self.left_out = False
        self.scheduled: list[ScheduledSequence] = []
        self.swap_out: BlockCopies = []
        self.swap_in: BlockCopies = []
        self.block_copies: BlockCopies = []
        self.swapped: list[Sequence] = []
        self.preempted = False

    def output(self) -> SchedulerOutput:
        assert self.scheduled or not self.swapped
        assert not (self.swap_out and self.swap_in)
        self.scheduled.sort(key=_variant_number)
        return SchedulerOutput(
            tuple(self.scheduled),
            swap_out=tuple(self.swap_out),
            swap_in=tuple(self.swap_in),
            block_copies=tuple(self.block_copies),
            swapped=tuple(self.swapped),
        )


def _variant_number(item: ScheduledSequence) -> int:
    variant = item.sequence.variant
    return 0 if variant is None else variant.number

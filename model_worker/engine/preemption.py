"""Taking blocks from running sequences, by swapping or by computing them again, and giving them back. Pure Python."""

from __future__ import annotations

from model_worker.engine.block_manager import BlockCopies, BlockManager
from model_worker.engine.preemption_cost import PreemptionCost
from model_worker.engine.sequence import Sequence, SequenceStatus
from model_worker.engine.step import SchedulerOutput
from model_worker.engine.step_in_progress import StepInProgress


class Preemption:
    """Chooses the cheaper way for each sequence.

    Attributes:
        cost: what the ways have taken.
        num_preemptions, num_by_swap: so far.
        num_swapped_out_blocks, num_swapped_in_blocks: likewise.
    """

    def __init__(self, block_manager: BlockManager) -> None:
        self.cost = PreemptionCost()
        self.num_preemptions = 0
        self.num_by_swap = 0
        self.num_swapped_out_blocks = 0
        self.num_swapped_in_blocks = 0
        self._block_manager = block_manager

    def take_blocks(self, sequence: Sequence, step: StepInProgress) -> None:
        """It waits from now on, swapped or with nothing."""
        step.preempted = sequence.preempted = True
        self.num_preemptions += 1
        copies = None if step.swap_in else self._swap_out(sequence)
        if copies is None:
            self._block_manager.release(sequence)
            sequence.status = SequenceStatus.WAITING
            return
        sequence.status = SequenceStatus.SWAPPED
        self.num_by_swap += 1
        self.num_swapped_out_blocks += len(copies)
        step.swap_out += copies
        step.swapped.append(sequence)

    def give_back(self, sequence: Sequence, step: StepInProgress, *, reserve: int) -> bool:
        """Have a swapped sequence swapped in; False, with nothing changed, when fewer than `reserve` blocks would stay.

        Not in a step that runs ahead: the sequence could be left out in the end, and the step be empty but for this.
        """
        if step.ahead:
            step.left_out = True
            return False
        copies = self._block_manager.swap_in(sequence, reserve=reserve)
        if copies is None:
            return False
        self.num_swapped_in_blocks += len(copies)
        step.swap_in += copies
        step.swapped.append(sequence)
        return True

    def observe(self, output: SchedulerOutput, *, computing_s: float, swap_s: float) -> None:
        """Take note of how long a step took to compute and to swap."""
        num_swapped = len(output.swap_out) + len(output.swap_in)
        if num_swapped:
            self.cost.blocks_swapped(num_swapped, swap_s)
        num_tokens, num_sequences = output.num_tokens, len(output.scheduled)
        # Else it tells more of decoding than of prompts.
        if num_tokens - output.num_drafts != num_sequences and num_tokens >= 2 * num_sequences:
            self.cost.prompts_computed(num_tokens, computing_s)

    def _swap_out(self, sequence: Sequence) -> BlockCopies | None:
        """None when recomputation is the better way, or the only one."""
        manager = self._block_manager
        if manager.num_host_blocks == 0 or sequence.num_computed_tokens == 0:
            return None
        if not self.cost.prefers_swap(manager.preemption_size(sequence)):
            return None
        return manager.swap_out(sequence)

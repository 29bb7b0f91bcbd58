"""Guesses in the steps of the scheduler. Pure Python; no torch."""

from __future__ import annotations

from model_worker.engine.block_manager import BlockManager
from model_worker.engine.config import SchedulerConfig
from model_worker.engine.speculation.speculator import Speculator
from model_worker.engine.speculation.step_time import StepTime
from model_worker.engine.step import ScheduledSequence, SchedulerOutput
from model_worker.engine.step_in_progress import StepInProgress


class StepDrafts:
    """Has guesses computed with the tokens that they follow, as far as tokens and blocks are left over.

    At most `max_num_seqs` in all, because each needs logits: a row of the whole vocabulary.
    """

    def __init__(self, speculator: Speculator, block_manager: BlockManager, config: SchedulerConfig) -> None:
        self._speculator = speculator
        self._block_manager = block_manager
        self._config = config

    @property
    def step_time(self) -> StepTime:
        """What rows cost, which whoever runs the steps has to tell it."""
        return self._speculator.step_time

    def add(self, step: StepInProgress, *, num_running: int) -> None:
        """Put guesses behind the tokens of decoding sequences."""
        places = [place for place, item in enumerate(step.scheduled) if len(item.sampled) == 1]
        drafts = self._speculator.draft(
            [step.scheduled[place].sequence for place in places],
            max_drafts=min(self._config.max_num_seqs, self._config.max_num_batched_tokens - len(step.scheduled)),
        )
        for place, guesses in zip(places, drafts, strict=True):
            sequence, start, _, sampled, _ = step.scheduled[place]
            if not guesses:
                continue
            # As at admission, a block for each running sequence stays free.
            copies = self._block_manager.grow(sequence, num_drafts=len(guesses), reserve=num_running)
            if copies is not None:
                assert not copies  # the next position is writable already
                step.scheduled[place] = ScheduledSequence(sequence, start, 1 + len(guesses), sampled, tuple(guesses))

    def would_pay(self, output: SchedulerOutput) -> bool:
        """Whether there would be guesses at what follows the tokens of a finished step."""
        if output.num_tokens != len(output.scheduled):
            return False
        sequences = [item.sequence for item in output.scheduled if not item.sequence.finished]
        return any(self._speculator.draft(sequences, max_drafts=self._config.max_num_seqs))

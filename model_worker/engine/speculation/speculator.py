"""Chooses the drafts of each step."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

from model_worker.engine.config import SpeculationConfig
from model_worker.engine.sequence import Sequence
from model_worker.engine.speculation.acceptance_rate import AcceptanceRate
from model_worker.engine.speculation.draft_lengths import draft_lengths
from model_worker.engine.speculation.ngram_proposer import NgramProposer
from model_worker.engine.speculation.sequence_drafter import SequenceDrafter
from model_worker.engine.speculation.step_time import StepTime

_WINDOW = 512  # guesses of all sequences that tell what to expect of a new one
_PRIOR = 0.5  # before there was any guess
_MIN_PROBE = 2  # rows by which steps must differ to find out what a row costs
_PROBE_SHARE = 4  # the same as a share of the batch: one in so many
_MAX_ENTERED = 2048  # tokens of prompts in one step, which take a millisecond, shared by the sequences,
_MIN_ENTERED = 16  # but at least so many for each, so that it keeps up with its own output


class Speculator:
    """Guesses for a batch of decoding sequences, as many as are measured to pay.

    Nothing is guessed for a sequence whose guesses fail too often for what a row costs, nor for any where the batch is
    so large that rows are dear. While it is not known what a row costs, steps are made to differ: a few rows more where
    the guesses would be worth it if rows were free, or a step without drafts.

    Attributes:
        step_time: the cost of rows, which whoever runs the steps has to tell it.
    """

    def __init__(self, config: SpeculationConfig) -> None:
        self.config = config
        self.step_time = StepTime()
        self._overall = AcceptanceRate(_WINDOW)
        self._num_drafts = 0  # in the last step

    def draft(self, sequences: SequenceOf[Sequence], *, max_drafts: int) -> list[list[int]]:
        """The tokens that may follow each sequence, to be computed in the next step.

        Args:
            sequences: all those of the step, which is decoding only.
            max_drafts: for all of them together.

        Returns:
            [len(sequences)] Never so many that a sequence could get more tokens than it may have.
        """
        proposals: list[list[int]] = []
        rates: list[float] = []
        max_entered = max(_MIN_ENTERED, _MAX_ENTERED // max(1, len(sequences)))
        for sequence in sequences:
            if not sequence.may_have_drafts:
                proposals.append([])
                rates.append(0.0)
                continue
            if sequence.drafter is None:
                proposer = NgramProposer(self.config.ngram_min, self.config.ngram_max)
                sequence.drafter = SequenceDrafter(proposer, self._overall)
            proposal = sequence.drafter.propose(
                sequence.token_ids, self.config.num_speculative_tokens, max_entered=max_entered
            )
            proposals.append(proposal[: sequence.num_tokens_left - 1])  # the step yields one token more
            rates.append(sequence.drafter.rate(_PRIOR))
        lengths = self._lengths(rates, [len(proposal) for proposal in proposals], max_drafts)
        self._num_drafts = sum(lengths)
        return [proposal[:num] for proposal, num in zip(proposals, lengths, strict=True)]

    def _lengths(self, rates: list[float], most: list[int], max_drafts: int) -> list[int]:
        num_rows = len(rates)
        probe = max(_MIN_PROBE, num_rows // _PROBE_SHARE)
        step_s, row_s = self.step_time.seconds(num_rows), self.step_time.row_s
        if not self.step_time.tells_apart(probe):
            if self.step_time.mean_rows > num_rows + probe / 2:
                return [0] * num_rows
            max_drafts, step_s, row_s = min(max_drafts, probe), 1.0, 0.0
        # Far beyond what was measured the line may not hold: steps grow by degrees, and each tells more.
        max_drafts = min(max_drafts, 2 * max(probe, self._num_drafts))
        return draft_lengths(rates, most, num_rows=num_rows, max_drafts=max_drafts, step_s=step_s, row_s=row_s)

"""A sequence as it will be if its first drafts are right: what the sampler has to know to draw the token after them."""

from __future__ import annotations

from array import array

from model_worker.engine.sampling_params import SamplingParams
from model_worker.engine.sequence import Sequence


class DraftedSequence:
    """The SampledRow of a sequence and some drafts after its tokens.

    Everything that depends on earlier output (the random number, min_tokens, penalties) sees the drafts as output, so a
    token drawn after right drafts is the one that would have been drawn without them.
    """

    __slots__ = ("_drafts", "_output_counts", "_sequence")

    def __init__(self, sequence: Sequence, drafts: tuple[int, ...]) -> None:
        self._sequence = sequence
        self._drafts = drafts
        self._output_counts: dict[int, int] | None = None

    @property
    def sampling(self) -> SamplingParams:
        return self._sequence.sampling

    @property
    def seed(self) -> int:
        return self._sequence.seed

    @property
    def num_tokens(self) -> int:
        return self._sequence.num_tokens + len(self._drafts)

    @property
    def num_output_tokens(self) -> int:
        return self._sequence.num_output_tokens + len(self._drafts)

    @property
    def output_counts(self) -> dict[int, int]:
        if self._output_counts is None:
            counts = self._sequence.output_counts.copy()
            for token_id in self._drafts:
                counts[token_id] = counts.get(token_id, 0) + 1
            self._output_counts = counts
        return self._output_counts

    @property
    def prompt_unique_ids(self) -> array[int]:
        return self._sequence.prompt_unique_ids

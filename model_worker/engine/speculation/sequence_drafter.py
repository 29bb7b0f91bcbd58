"""Guesses for one sequence, and how good they have been."""

from __future__ import annotations

from collections.abc import Sequence

from model_worker.engine.speculation.acceptance_rate import AcceptanceRate
from model_worker.engine.speculation.ngram_proposer import NgramProposer

_WINDOW = 32  # guesses; a text begins and ends to repeat itself within a few dozen tokens


class SequenceDrafter:
    """Compares each proposal with the tokens that come, whether or not they were computed with it.

    So the rate of a sequence for which nothing is speculated stays up to date at no cost in rows, and speculation comes
    back as soon as guesses begin to be right.

    Args:
        overall: of all sequences; what is expected of this one before it has had guesses.
    """

    __slots__ = ("_acceptance", "_num_tokens", "_overall", "_proposal", "_proposer")

    def __init__(self, proposer: NgramProposer, overall: AcceptanceRate) -> None:
        self._proposer = proposer
        self._acceptance = AcceptanceRate(_WINDOW)
        self._overall = overall
        self._proposal: list[int] = []  # of the last call
        self._num_tokens = 0  # of the sequence then

    def propose(self, token_ids: Sequence[int], num_tokens: int, *, max_entered: int) -> list[int]:
        """The next tokens, as NgramProposer guesses them."""
        self._judge(token_ids)
        self._proposal = self._proposer.propose(token_ids, num_tokens, max_entered=max_entered)
        self._num_tokens = len(token_ids)
        return self._proposal

    def rate(self, prior: float) -> float:
        """The probability that the next token of a proposal is right, given that those before it are."""
        return self._acceptance.rate(self._overall.rate(prior))

    def _judge(self, token_ids: Sequence[int]) -> None:
        if not self._proposal:
            return
        came = token_ids[self._num_tokens : self._num_tokens + len(self._proposal)]
        num_right = num_leading_equal(self._proposal, came)
        for acceptance in (self._acceptance, self._overall):
            acceptance.observe(num_right, then_wrong=num_right < len(came))


def num_leading_equal(a: Sequence[int], b: Sequence[int]) -> int:
    """How many leading elements two sequences have in common."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))

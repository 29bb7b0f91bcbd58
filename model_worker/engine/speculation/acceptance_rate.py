"""How likely the next guess is right: a mean over the latest guesses."""

from __future__ import annotations

_PRIOR_WEIGHT = 4.0  # guesses that what was expected beforehand counts for


class AcceptanceRate:
    """The share of right guesses among the latest ones.

        rate = (right + w * prior) / (right + wrong + w)       counts decay by 1 / window with each guess

    Args:
        window: about how many guesses are remembered.
    """

    __slots__ = ("_keep", "_num_guesses", "_num_right")

    def __init__(self, window: int) -> None:
        self._keep = 1.0 - 1.0 / window
        self._num_right = 0.0
        self._num_guesses = 0.0

    def observe(self, num_right: int, *, then_wrong: bool) -> None:
        """So many guesses in a row were right; the one after them was wrong, or was not there to be checked."""
        for right in (1.0,) * num_right + (0.0,) * then_wrong:
            self._num_right = self._num_right * self._keep + right
            self._num_guesses = self._num_guesses * self._keep + 1.0

    def rate(self, prior: float) -> float:
        """In [0, 1]; `prior` is what is expected before there is a guess."""
        return (self._num_right + _PRIOR_WEIGHT * prior) / (self._num_guesses + _PRIOR_WEIGHT)

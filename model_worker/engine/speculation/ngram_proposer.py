"""Guesses at the next tokens of a sequence: what followed its last tokens where they stood before."""

from __future__ import annotations

from collections.abc import Sequence

_MAX_ENTERED = 256  # tokens in one call: about half a millisecond


class NgramProposer:
    """An index over the tokens of one sequence, which only ever grows.

        token_ids   [ ...... a b c | x y z ............. a b c ]     proposal: x y z ...
                                   end                        len

    Finding a proposal and entering a token take a dictionary look-up for each length, however long the sequence is. A
    long prompt is entered in pieces, one a call, so that no step waits for all of it; until then nothing is proposed.
    A token takes about 100 bytes of memory for each length.

    Args:
        min_tokens, max_tokens: how many last tokens must have stood together before; longer matches go first.
    """

    __slots__ = ("_ends", "_num_entered")

    def __init__(self, min_tokens: int, max_tokens: int) -> None:
        assert 1 <= min_tokens <= max_tokens
        # Length to n-gram to the end (exclusive) of its latest occurrence. The last token is not entered yet, so that
        # the last n-gram does not find itself.
        self._ends: dict[int, dict[tuple[int, ...], int]] = {n: {} for n in range(max_tokens, min_tokens - 1, -1)}
        self._num_entered = 0

    def propose(self, token_ids: Sequence[int], num_tokens: int) -> list[int]:
        """Guess the next `num_tokens` tokens; none when the last tokens are new.

        A guess that reaches the end of the sequence goes on with its own beginning, so that the period of a repetition
        may be shorter than the guess.

        Args:
            token_ids: the same sequence as in the last call, and what was added since.
        """
        self._enter(token_ids)
        if self._num_entered < len(token_ids) - 1:
            return []
        for n, ends in self._ends.items():
            end = ends.get(tuple(token_ids[-n:]))
            if end is not None:
                found = list(token_ids[end : end + num_tokens])
                for i in range(num_tokens - len(found)):
                    found.append(found[i])
                return found
        return []

    def _enter(self, token_ids: Sequence[int]) -> None:
        num_tokens = min(len(token_ids) - 1, self._num_entered + _MAX_ENTERED)
        for n, ends in self._ends.items():
            for end in range(max(self._num_entered + 1, n), num_tokens + 1):
                ends[tuple(token_ids[end - n : end])] = end
        self._num_entered = num_tokens

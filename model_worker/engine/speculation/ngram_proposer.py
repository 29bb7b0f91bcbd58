"""Guesses at the next tokens of a sequence: what followed its last tokens where they stood before."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

_MAX_TRIED = 16  # earlier places that are compared with the end of the sequence
_ID_BITS = 32


class NgramProposer:
    """An index over the tokens of one sequence, which only ever grows.

        token_ids   [ ...... a b c | x y z ............. a b c ]     proposal: x y z ...
                                   end                        len

    The places at which the last `min_tokens` tokens stood before are tried from the latest to earlier ones, 16 at most,
    and the one after the longest match is taken; of equally long ones the latest. So a proposal takes a few
    microseconds and entering a token takes one dictionary look-up, however long the sequence is. A token takes about
    120 bytes of memory. The keys are numbers, because a million tuples would stop the process for a tenth of a second
    whenever the garbage collector looks through them.

    Args:
        min_tokens: so many last tokens must have stood together before.
        max_tokens: a longer match is not better than one of so many.
    """

    __slots__ = ("_latest", "_mask", "_max_tokens", "_min_tokens", "_ngram", "_num_entered", "_previous")

    def __init__(self, min_tokens: int, max_tokens: int) -> None:
        assert 1 <= min_tokens <= max_tokens
        self._min_tokens = min_tokens
        self._max_tokens = max_tokens
        # Of each n-gram of `min_tokens` the end (exclusive) of its latest occurrence, and for each such end that of the
        # occurrence before; 0, where no n-gram can end: there is none. The last token is not entered yet, so that the
        # last n-gram does not find itself.
        self._latest: dict[int, int] = {}
        self._previous = array("i", [0] * min_tokens)
        self._num_entered = 0
        self._ngram = 0  # the last tokens entered as digits of one number
        self._mask = (1 << _ID_BITS * min_tokens) - 1

    def propose(self, token_ids: Sequence[int], num_tokens: int, *, max_entered: int = 2**31) -> list[int]:
        """Guess the next `num_tokens` tokens; none when the last tokens are new.

        A guess that reaches the end of the sequence goes on with its own beginning, so that the period of a repetition
        may be shorter than the guess.

        Args:
            token_ids: the same sequence as in the last call, and what was added since.
            max_entered: most tokens to enter in this call; until all are entered nothing is proposed.
        """
        self._enter(token_ids, max_entered)
        if self._num_entered < len(token_ids) - 1:
            return []
        end = self._longest_match(token_ids)
        if end == 0:
            return []
        found = list(token_ids[end : end + num_tokens])
        for i in range(num_tokens - len(found)):
            found.append(found[i])
        return found

    def _longest_match(self, token_ids: Sequence[int]) -> int:
        last = len(token_ids)
        longest = longest_end = 0
        end = self._latest.get((self._ngram << _ID_BITS | token_ids[-1]) & self._mask, 0)
        for _ in range(_MAX_TRIED):
            if end == 0:
                break
            num = self._min_tokens
            while num < min(end, self._max_tokens) and token_ids[end - num - 1] == token_ids[last - num - 1]:
                num += 1
            if num > longest:
                longest, longest_end = num, end
                if num == self._max_tokens:
                    break
            end = self._previous[end]
        return longest_end

    def _enter(self, token_ids: Sequence[int], max_entered: int) -> None:
        num_tokens = min(len(token_ids) - 1, self._num_entered + max_entered)
        latest, previous, ngram = self._latest, self._previous, self._ngram
        for end in range(self._num_entered + 1, num_tokens + 1):
            ngram = (ngram << _ID_BITS | token_ids[end - 1]) & self._mask
            if end >= self._min_tokens:
                previous.append(latest.get(ngram, 0))
                latest[ngram] = end
        self._ngram = ngram
        self._num_entered = num_tokens

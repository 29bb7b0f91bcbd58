"""How many guesses of each sequence are worth their rows."""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heapify, heapreplace

_MIN_SPEEDUP = 1.05  # less is within the error of what was measured


def draft_lengths(
    rates: Sequence[float], most: Sequence[int], *, num_rows: int, max_drafts: int, step_s: float, row_s: float
) -> list[int]:
    """The numbers of drafts d that make a step yield the most tokens in a second; all 0 where that gains too little.

        tokens(d) = num_rows + sum over sequences s of (rate_s + rate_s**2 + ... + rate_s**d_s)
        maximize    tokens(d) / (step_s + row_s * sum of d)

    The guesses are taken in the order of what they add. Because that falls and a row always costs the same, the first
    one that does not raise the quotient ends it.

    Args:
        rates: for each sequence with a proposal, the probability that a guess is right.
        most: for each of them, how many guesses there are.
        num_rows: rows of the step without drafts.
        max_drafts: for all sequences together.
        step_s: seconds of the step without drafts.
        row_s: seconds that each draft adds.
    """
    lengths = [0] * len(rates)
    gains = [(-rate, i) for i, (rate, num) in enumerate(zip(rates, most, strict=True)) if num > 0]
    heapify(gains)  # the largest gain first
    tokens, seconds = float(num_rows), step_s
    for _ in range(max_drafts):
        if not gains:
            break
        gain, i = gains[0]
        if gain == 0.0 or -gain * seconds < row_s * tokens:
            break
        lengths[i] += 1
        tokens -= gain
        seconds += row_s
        heapreplace(gains, (gain * rates[i] if lengths[i] < most[i] else 0.0, i))
    pays = tokens * step_s >= _MIN_SPEEDUP * num_rows * seconds
    return lengths if pays else [0] * len(rates)

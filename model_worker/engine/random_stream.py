"""Random numbers that are a pure function of (seed, position): no state, so nothing to save, restore or share.

A sequence draws the same number for the same position whatever else is in the batch, in whatever row it stands, and
again after a preemption.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

_GAMMA = np.uint64(0x9E3779B97F4A7C15)  # the increment of SplitMix64
_MASK = 2**64 - 1


def uniform(seeds: Sequence[int], positions: Sequence[int]) -> npt.NDArray[np.float64]:
    """One double in [0, 1) for each pair, a multiple of 2^-53.

        u(seed, position) = (mix(mix(seed) + (position + 1) * gamma) >> 11) * 2^-53

    The seed is mixed before the position is added: seeds that differ by small numbers, or by multiples of gamma, start
    far apart on the one orbit of the counter, so that their streams are not shifted copies of each other.

    Args:
        seeds: [num_rows] any integers; taken modulo 2^64.
        positions: [num_rows] of the token that is drawn; non-negative.

    Source: SplitMix64, in Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
    """
    start = _mix(np.array([seed & _MASK for seed in seeds], dtype=np.uint64))
    counter = np.array(positions, dtype=np.uint64) + np.uint64(1)
    bits = _mix(start + counter * _GAMMA)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(bits: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))

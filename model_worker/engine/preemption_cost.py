"""Whether a preempted sequence is swapped or computed again: whichever brings it back sooner. Pure Python; no torch.

    recompute   seconds per token * tokens that the prefix cache would not find
    swap        seconds per block * blocks copied, out and in together

Both rates are measured while the engine runs. What has not been measured yet counts as nothing, so that it is tried:
a host pool exists only where it was asked for or is likely to pay.
"""

from __future__ import annotations

from model_worker.engine.block_manager import PreemptionSize

_WEIGHT_OF_NEWEST = 0.2  # in the running means


class PreemptionCost:
    """Running means of the two rates.

    Attributes:
        token_s: seconds to compute one token of a prompt; None: not measured.
        block_s: seconds to copy one block in either direction; None: not measured.
    """

    def __init__(self) -> None:
        self.token_s: float | None = None
        self.block_s: float | None = None

    def prompts_computed(self, num_tokens: int, seconds: float) -> None:
        """A step computed `num_tokens`, most of them of prompts."""
        self.token_s = _mean(self.token_s, seconds / num_tokens)

    def blocks_swapped(self, num_blocks: int, seconds: float) -> None:
        self.block_s = _mean(self.block_s, seconds / num_blocks)

    def prefers_swap(self, size: PreemptionSize) -> bool:
        if self.block_s is None:
            return True
        return size.num_blocks * self.block_s < size.num_tokens * (self.token_s or 0.0)


def _mean(mean: float | None, newest: float) -> float:
    return newest if mean is None else mean + _WEIGHT_OF_NEWEST * (newest - mean)

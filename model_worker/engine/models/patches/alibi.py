"""The slopes of linear position biases."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def alibi_slopes(num_heads: int) -> Tensor:
    """Slopes of the heads, [H] float32.

    For H = 2^k a geometric series that starts at 2^(-8 / H) with the same ratio; for other H that of the next smaller
    power of two, followed by every second one of the next larger. Source: Press et al., arXiv 2108.12409, section 3,
    and the authors' code.
    """
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = [2.0 ** (-8.0 * i / power) for i in range(1, power + 1)]
    slopes += [2.0 ** (-4.0 * i / power) for i in range(1, 2 * (num_heads - power), 2)]
    return torch.tensor(slopes, dtype=torch.float32)

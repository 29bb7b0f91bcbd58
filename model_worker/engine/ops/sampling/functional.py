"""One token for each row of logits, drawn where the logits are, without waiting for the device.

    w[i]         exp((l[i] - max l) * inverse_temperature), 0 where that is below min_p
    order        by descending l, then ascending i: c[0], c[1], ...
    n            min(top_k, number of tokens with w > 0)
    m            smallest number with w[c[0]] + ... + w[c[m - 1]] >= top_p * (w[c[0]] + ... + w[c[n - 1]])
    kept         c[0] ... c[m - 1]

    token        the first kept one at which the running sum of w exceeds uniform * (sum of w over the kept ones);
                 in the order above, but by ascending id where neither top_k nor top_p is set, and where top_p alone
                 keeps more than 1,024 tokens or reaches one that ties with the 1,024th

top_k 1 is greedy: of the largest logits the one with the lowest id. That is the definition of `token_draw`, whose
tokens these are up to rounding: on GPUs sums are exact integers of w rounded to multiples of 2^-40, there they are
float64 sums of w. So a token can be another one only where a sum comes within about V * 2^-41 of the limit that it is
compared with, or exp is rounded otherwise. A row's token depends on no other row.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from model_worker.engine.ops.sampling.reference import PARAMETER_COLUMNS, draw_reference

__all__ = ["NUM_ORDERED", "PARAMETER_COLUMNS", "Draws", "draw_tokens"]

NUM_ORDERED = 1024  # most tokens that a GPU puts in order


class Draws(NamedTuple):
    """Of R rows.

    Attributes:
        tokens: [R] int64; 0 where the row is not finite.
        finite: [R] bool; no logit is NaN or +inf, and one is above -inf.
    """

    tokens: Tensor
    finite: Tensor


def draw_tokens(logits: Tensor, parameters: Tensor, sorted_rows: Tensor | None = None) -> Draws:
    """See the module's docstring.

    Args:
        logits: [R, V] float32, contiguous; not changed.
        parameters: [R, 5] float64 on the same device: inverse_temperature, min_p (0: off), top_k (V: off), top_p
            (1: off), uniform in [0, 1).
        sorted_rows: [n] int64 on the same device, the rows with 1,024 < top_k < V, whose whole vocabulary is sorted;
            None: there are none.
    """
    assert logits.dtype == torch.float32
    assert logits.is_contiguous()
    assert parameters.dtype == torch.float64
    assert parameters.shape == (len(logits), PARAMETER_COLUMNS)
    assert parameters.is_contiguous()
    if logits.device.type != "cuda":
        return Draws(*draw_reference(logits, parameters, NUM_ORDERED))
    from model_worker.engine.ops.sampling import triton  # not installed where there is no GPU

    draws = Draws(*triton.draw_tokens(logits, parameters, NUM_ORDERED))
    if sorted_rows is not None:
        drawn, _ = draw_reference(logits[sorted_rows], parameters[sorted_rows], NUM_ORDERED)
        draws.tokens[sorted_rows] = drawn
    return draws

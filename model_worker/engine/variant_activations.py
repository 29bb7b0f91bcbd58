"""What the variants of a step's rows take while it is computed, beside what the base takes: by calculation.

No variant is there when the largest step is measured, and those that come may change any matrix [N, K] in any way. Then
a layer holds at most, for its T rows, and for nobody else's at the same time:

    d * x, or x by parts of signs         [T, K]    in the model's dtype
    x A^T, in float32                     [T, r]    of the two or three matrices that read one input
    x Z^T, and its sum with y             [T, N]    twice, in the model's dtype
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

MAX_RANK = 1024  # that is accounted for
_NUM_SHARING_INPUT = 3
_FLOAT32_BYTES = 4


def variant_activation_bytes(
    shapes: Iterable[torch.Size], *, num_tokens: int, num_samples: int, vocab_size: int, dtype_bytes: int
) -> int:
    """The most that variants take beside the base's activations in a step.

    Args:
        shapes: of all weights; those of matrices are looked at, and of experts the last two sizes.
        num_tokens: of the largest step.
        num_samples: of the largest step; where variants have tokens of their own, logits are sampled group by group,
            and a group is a copy of its rows.
        dtype_bytes: of a number in the model's dtype.
    """
    linears = (tuple(shape[-2:]) for shape in shapes if len(shape) >= 2 and vocab_size not in shape)
    largest = max((inputs + 2 * outputs for outputs, inputs in linears), default=0)
    in_layers = num_tokens * (dtype_bytes * largest + _FLOAT32_BYTES * _NUM_SHARING_INPUT * MAX_RANK)
    return max(in_layers, num_samples * _FLOAT32_BYTES * vocab_size)

"""What the variants of a step's rows take while it is computed, beside what the base takes: by calculation.

No variant is there when the largest step is measured, and those that come may change any matrix [N, K] in any way. Then
a layer holds at most, for its T rows, and for nobody else's at the same time:

    d * x                                 [T, K]           in the model's dtype
    and either
    x A^T, in splits of K                 [S, P, T, r]     in float32, of the P matrices that read one input
    or
    x Z^T, and its sum with y             [T, N]           twice, in the model's dtype
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import torch

MAX_RANK = 1024  # that is accounted for
_SPLIT_INPUTS = 512  # see ops/low_rank
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
    linears = [(shape[-1], shape[-2]) for shape in shapes if len(shape) >= 2 and vocab_size not in shape]
    hidden_size = max(Counter(inputs for inputs, _ in linears).items(), key=lambda found: found[1], default=(0, 0))[0]
    of_row = 0
    for inputs, outputs in linears:
        num_parts = _NUM_SHARING_INPUT if inputs == hidden_size else 1
        low_rank = _FLOAT32_BYTES * -(-inputs // _SPLIT_INPUTS) * num_parts * MAX_RANK
        of_row = max(of_row, dtype_bytes * inputs + max(low_rank, 2 * dtype_bytes * outputs))
    return max(num_tokens * of_row, num_samples * _FLOAT32_BYTES * vocab_size)

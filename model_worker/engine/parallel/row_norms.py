"""Norms over all heads of which each rank has some (olmo2's of queries and keys).

    own = mean(x^2) of this rank's numbers,  all = mean(own) of all ranks, which have equally many
    y = x / sqrt(all + epsilon) * w = (x / sqrt(own + epsilon) * w) * sqrt((own + epsilon) / (all + epsilon))

So each rank normalizes what it has, as if that were all, and scales it: y is rounded twice. Heads that several ranks
have count as often on each, and so do not change the mean.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from model_worker.engine.parallel.group import RankGroup


def row_scales(parts: Sequence[Tensor], epsilon: float, group: RankGroup) -> tuple[Tensor, ...]:
    """What rows are to be multiplied with after they are normalized alone; one sum over all ranks, of all parts.

    Args:
        parts: [T, any size] each, which are normalized one by one.

    Returns:
        For each part [T, 1] float32.
    """
    own = torch.stack([part.float().square().mean(dim=1) for part in parts], dim=1)  # [T, parts]
    of_all = group.all_reduce(own.clone()) / group.size
    return torch.split(((own + epsilon) / (of_all + epsilon)).sqrt(), 1, dim=1)

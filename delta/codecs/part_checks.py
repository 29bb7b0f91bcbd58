"""Checks of stored parts, for the `check` of every codec: a ValueError says which part is wrong."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from delta.codecs.codec import Parts


def check_names(parts: Parts, *names: str) -> None:
    """Raises ValueError: the parts are not exactly these."""
    if set(parts) != set(names):
        raise ValueError(f"has the parts {sorted(parts)} instead of {sorted(names)}")


def check_part(parts: Parts, name: str, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...]) -> Tensor:
    """The part; raises ValueError: another dtype or shape."""
    part = parts[name]
    if part.dtype not in dtypes:
        raise ValueError(f"{name} is of type {part.dtype} instead of {' or '.join(map(str, dtypes))}")
    if tuple(part.shape) != shape:
        raise ValueError(f"{name} is {list(part.shape)} instead of {list(shape)}")
    return part


def check_finite(parts: Parts, *names: str) -> None:
    """Raises ValueError: a number is infinite or none. Several times as fast as `isfinite` of each."""
    for name in names:
        if parts[name].numel() == 0:
            continue
        low, high = torch.aminmax(parts[name].float())
        if not (math.isfinite(low.item()) and math.isfinite(high.item())):
            raise ValueError(f"{name} holds values that are not finite")

"""Rotary position embedding of tensors in a model's dtype as its formula says; see functional.py."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class RotaryCosSin(NamedTuple):
    """Of the tokens of a step: cos and sin [T, R / 2] in the model's dtype, contiguous."""

    cos: Tensor
    sin: Tensor


def rotary_table_reference(
    positions: Tensor, inverse_frequencies: Tensor, attention_scaling: float, dtype: torch.dtype
) -> RotaryCosSin:
    """positions [T], inverse_frequencies [R / 2] -> cos, sin [T, R / 2]"""
    angles = positions.float()[:, None] * inverse_frequencies
    return RotaryCosSin((angles.cos() * attention_scaling).to(dtype), (angles.sin() * attention_scaling).to(dtype))


def rotate_reference(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotates the heads of x [T, heads, D], in place; cos, sin [T, R / 2] of its dtype."""
    half = cos.shape[1]
    first, second = x[..., :half].clone(), x[..., half : 2 * half].clone()
    x[..., :half] = first * cos[:, None] - second * sin[:, None]
    x[..., half : 2 * half] = second * cos[:, None] + first * sin[:, None]

"""Equality of tensors to the last bit."""

from __future__ import annotations

import torch


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether two tensors have one dtype, shape and bytes: tells -0 from 0, and a NaN equals itself."""
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    mine, other = (tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (left, right))
    return torch.equal(mine, other)

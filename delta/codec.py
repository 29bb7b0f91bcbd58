"""Codecs of a delta: how the change of one tensor is stored. D is what is stored, W the base, W' the fine-tune.

    dense     W' = cast(fp32(W) + fp32(D))      D in the fine-tune's dtype where that is exact, else in float32
    replace   W' = D                            where no difference gives the fine-tune's bits back

The encoder tries them in this order and keeps the first that gives the fine-tune back bit for bit.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch

Codec: TypeAlias = Literal["dense", "replace"]
CODECS: tuple[Codec, ...] = ("dense", "replace")


def encode(base: torch.Tensor, target: torch.Tensor) -> tuple[Codec, torch.Tensor]:
    """The smallest exact form of `target` given `base`, both of one shape."""
    if base.is_floating_point() and target.is_floating_point():
        difference = target.float() - base.float()
        for dtype in (target.dtype, torch.float32):
            stored = difference.to(dtype)
            if same_bits(add(base, stored, target.dtype), target):
                return "dense", stored
    return "replace", target


def add(base: torch.Tensor, stored: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """cast(fp32(W) + fp32(D))."""
    return (base.float() + stored.float()).to(dtype)


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether two tensors have one dtype, shape and bytes: tells -0 from 0, and a NaN equals itself."""
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    mine, other = (tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (left, right))
    return torch.equal(mine, other)

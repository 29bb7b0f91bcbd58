"""The norm as its formula says, in torch."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm_reference(
    x: Tensor, weight: Tensor, epsilon: float, num_heads: int, segments: tuple[tuple[int, int, Tensor], ...]
) -> Tensor:
    """x [T, heads * size], weight [size] or [heads * size], others for rows start:end. -> y of x's shape and dtype"""
    heads = x.float().view(len(x), num_heads, x.shape[1] // num_heads)  # [T, heads, size]
    normalized = heads * torch.rsqrt(heads.square().mean(dim=-1, keepdim=True) + epsilon)
    if weight.dtype == x.dtype:
        normalized = normalized.to(x.dtype)
    y = (normalized * weight.view(-1, heads.shape[2])).to(x.dtype)
    for start, end, other in segments:
        y[start:end] = (normalized[start:end] * other.view(-1, heads.shape[2])).to(x.dtype)
    return y.view(x.shape)

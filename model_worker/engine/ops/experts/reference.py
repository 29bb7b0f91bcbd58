"""A mixture of experts in torch."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F


def select_reference(logits: Tensor, num_chosen: int, *, normalize: bool) -> tuple[Tensor, Tensor]:
    """logits [T, E] -> choices [T, k] int32, weights [T, k] float32"""
    shares = logits.float().softmax(dim=-1).nan_to_num(nan=0.0).sort(dim=-1, descending=True, stable=True)
    weights, choices = shares.values[:, :num_chosen], shares.indices[:, :num_chosen]
    if normalize:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return choices.int().contiguous(), weights.contiguous()


def group_reference(choices: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """choices [T, k] -> starts [E + 1], tokens [T k], places [T, k], all int64"""
    chosen = choices.flatten()
    order = chosen.argsort(stable=True)
    places = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))
    starts = torch.zeros(num_experts + 1, dtype=torch.int64)
    starts[1:] = torch.bincount(chosen, minlength=num_experts).cumsum(0)
    return starts, order // choices.shape[1], places.view(choices.shape)


def expert_linear_reference(rows: Tensor, weight: Tensor, starts: Tensor) -> Tensor:
    """rows [P, K] in the order of experts, weight [E, N, K], starts [E + 1] -> [P, N]"""
    out = rows.new_empty(len(rows), weight.shape[1])
    limits = starts.tolist()
    for expert, (start, end) in enumerate(pairwise(limits)):
        if start < end:
            out[start:end] = F.linear(rows[start:end], weight[expert])
    return out


def combine_experts_reference(y: Tensor, places: Tensor, weights: Tensor) -> Tensor:
    """y [T k, size], places and weights [T, k] -> [T, size]"""
    return (y[places.long()].float() * weights[..., None]).sum(dim=1).to(y.dtype)

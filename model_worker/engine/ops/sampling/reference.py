"""Drawing as its definition says, by sorting every row, in torch. Nothing waits for the device."""

from __future__ import annotations

import torch
from torch import Tensor

PARAMETER_COLUMNS = 5
"""inverse_temperature, min_p, top_k, top_p, uniform"""


def draw_reference(logits: Tensor, parameters: Tensor, num_ordered: int) -> tuple[Tensor, Tensor]:
    """logits [R, V] float32, parameters [R, 5] float64 -> tokens [R] int64, finite [R] bool

    Args:
        num_ordered: from how many tokens on top_p alone draws by ascending id.
    """
    vocab_size = logits.shape[1]
    inverse_temperature, min_p, top_k, top_p, uniform = parameters.tensor_split(PARAMETER_COLUMNS, dim=1)  # [R, 1] each
    values, ids = (logits + 0.0).sort(dim=1, descending=True, stable=True)  # NaN comes first
    peak = values[:, :1]
    weights = ((values - peak) * inverse_temperature.float()).exp()
    weights = weights.masked_fill(weights < min_p.float(), 0.0).nan_to_num(0.0).double()
    eligible = (torch.arange(vocab_size, device=logits.device) < top_k) & (weights > 0)
    running = weights.where(eligible, 0.0).cumsum(dim=1)
    before = torch.cat((torch.zeros_like(running[:, :1]), running[:, :-1]), dim=1)
    kept = eligible & (before < top_p * running[:, -1:])
    kept[:, 0] = True
    weights = weights.where(kept, 0.0)
    by_id = (top_k >= vocab_size) & ((top_p >= 1.0) | (kept.sum(dim=1, keepdim=True) > _settled(values, num_ordered)))
    in_order_of_id = torch.zeros_like(weights).scatter_(1, ids, weights)
    place = _draw(weights.where(~by_id, in_order_of_id), uniform)
    tokens = torch.where(by_id, place, ids.gather(1, place)).squeeze(1)
    finite = peak.isfinite().squeeze(1)
    return tokens.where(finite, 0), finite


def _settled(values: Tensor, num_ordered: int) -> Tensor:
    """How many of the first tokens of `values` [R, V], descending, can be drawn in order. -> [R, 1]"""
    vocab_size = values.shape[1]
    last = values[:, min(num_ordered, vocab_size) - 1, None]
    above_last = (values > last).sum(dim=1, keepdim=True)
    return above_last.masked_fill((last == -torch.inf) | (num_ordered >= vocab_size), vocab_size)


def _draw(weights: Tensor, uniform: Tensor) -> Tensor:
    """The first place at which the running sum of `weights` [R, V] exceeds uniform [R, 1] times their sum. -> [R, 1]"""
    running = weights.cumsum(dim=1)
    total = running[:, -1:]
    target = torch.minimum(total * uniform, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(running, target, right=True).clamp_(max=weights.shape[1] - 1)

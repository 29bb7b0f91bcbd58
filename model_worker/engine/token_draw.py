"""Draw one token for each row from its logits: inverse transform sampling, without sorting the vocabulary.

Both functions walk the probabilities in an order that the row alone decides, with one uniform number a row, so neither
the other rows of a batch nor the number of candidates looked at changes a token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from model_worker.engine.top_tokens import next_num_candidates, num_settled, top_candidates

MIN_TEMPERATURE = 1e-5  # below it only tokens within rounding of the largest logit can be drawn anyway

_BLOCK = 256  # tokens whose weights are summed first, so that only one block a row is walked token by token
_MAX_SORTED = 1024  # candidates that top_p may take in order; beyond them its edge is found by a histogram
_NUM_BUCKETS = 16384  # so many that one holds few tokens
_NUM_EDGE_CANDIDATES = 128
_BUCKETS_PER_NAT = _NUM_BUCKETS / 104.0  # exp(-104) is 0 in float32: no weight lies further from the peak


@dataclass(frozen=True, slots=True)
class DrawInputs:
    """One row each for the rows of a draw.

    Attributes:
        logits: [R, V] float32, processed; at least one is finite in each row, none is NaN or +inf.
        peak: [R, 1] float32, the largest logit.
        inverse_temperature: [R, 1] float32, finite.
        min_p: [R, 1] float32; 0 is off.
        top_k: [R] int64; V is off.
        top_p: [R, 1] float64; 1 is off.
        uniform: [R, 1] float64 in [0, 1).
    """

    logits: Tensor
    peak: Tensor
    inverse_temperature: Tensor
    min_p: Tensor
    top_k: Tensor
    top_p: Tensor
    uniform: Tensor

    def rows(self, index: Tensor) -> DrawInputs:
        """The rows `index` [N] int64 only."""
        return DrawInputs(
            self.logits[index],
            self.peak[index],
            self.inverse_temperature[index],
            self.min_p[index],
            self.top_k[index],
            self.top_p[index],
            self.uniform[index],
        )


def draw_from_all(inputs: DrawInputs) -> Tensor:
    """Draw token i with probability proportional to w[i]; top_k and top_p are not looked at. -> [R] int64

        w[i] = exp((l[i] - max l) / temperature)   where that is at least min_p, else 0

    The token is the first one, by ascending id, at which the running sum of w exceeds uniform * sum(w).
    """
    return _draw_by_id(_weights(inputs), inputs.uniform)


def draw_from_top(inputs: DrawInputs, num_candidates: int) -> Tensor:
    """Draw from the tokens that min_p, then top_k, then top_p leave. -> [R] int64

        candidates   c[0], c[1], ...   tokens by descending logit, then ascending id
        w[j] = exp((l[c[j]] - max l) / temperature)
        n = min(top_k, number of j with w[j] >= min_p)
        m = smallest number with w[0] + ... + w[m - 1] >= top_p * (w[0] + ... + w[n - 1])

    The token is the first candidate at which the running sum of w exceeds uniform * (w[0] + ... + w[m - 1]).

    Args:
        num_candidates: how many to look at first. Rows that need more are tried again with more; where top_p alone
            leaves more than 1,024 tokens, they are taken by ascending id instead of in the order above.
    """
    num_rows, vocab_size = inputs.logits.shape
    tokens = torch.empty(num_rows, dtype=torch.int64, device=inputs.logits.device)
    mass = _mass_without_top_k(inputs)  # [R, 1]
    rows = torch.arange(num_rows, device=tokens.device)
    active = inputs
    while len(rows):
        num_candidates = min(num_candidates, vocab_size)
        values, ids = top_candidates(active.logits, num_candidates)  # [rows, num_candidates]
        weights = (values - active.peak).mul_(active.inverse_temperature).exp_()
        eligible = (weights > 0) & (weights >= active.min_p)
        num_kept = torch.minimum(eligible.sum(dim=1), active.top_k).unsqueeze(1)  # [rows, 1], n of the formula
        running = weights.double().cumsum(dim=1)
        whole = torch.where(
            active.top_k.unsqueeze(1) < vocab_size, running.gather(1, (num_kept - 1).clamp_(min=0)), mass[rows]
        )
        reached = torch.searchsorted(running, active.top_p * whole) + 1
        num_kept = torch.minimum(reached, num_kept)  # m of the formula
        target = _below(running.gather(1, num_kept - 1), active.uniform)
        drawn = ids.gather(1, torch.searchsorted(running, target, right=True))
        settled = num_kept.squeeze(1) <= num_settled(values, vocab_size)
        tokens[rows[settled]] = drawn[settled].squeeze(1)
        num_candidates = next_num_candidates(num_candidates, vocab_size)
        wide = ~settled & (active.top_k >= vocab_size) & (num_candidates > _MAX_SORTED)
        if bool(wide.any()):
            tokens[rows[wide]] = _draw_from_many(active.rows(wide.nonzero().squeeze(1)))
        unsettled = (~settled & ~wide).nonzero().squeeze(1)
        rows, active = rows[unsettled], active.rows(unsettled)
    return tokens


def _draw_from_many(inputs: DrawInputs) -> Tensor:
    """Draw from the tokens that min_p, then top_p leave, when they are too many to be put in order. -> [R] int64

    A histogram of the weights over the distance from the peak shows in which bucket top_p is reached; only the tokens
    of that bucket are put in order, to find the last token to keep. Then the draw is by ascending id.
    """
    weights = _weights(inputs)
    distance = (inputs.peak - inputs.logits).mul_(inputs.inverse_temperature)
    bucket = distance.mul_(_BUCKETS_PER_NAT).clamp_(max=_NUM_BUCKETS - 1).long()  # [R, V]
    running = torch.zeros(len(weights), _NUM_BUCKETS, dtype=torch.float64, device=weights.device)
    running = running.scatter_add_(1, bucket, weights.double()).cumsum_(dim=1)
    target = running[:, -1:] * inputs.top_p
    edge = torch.searchsorted(running, target)  # [R, 1]
    before = torch.where(edge > 0, running.gather(1, (edge - 1).clamp_(min=0)), 0.0)
    in_edge = inputs.logits.masked_fill((bucket != edge) | (weights == 0), -torch.inf)
    last_value, last_id = _last_kept(in_edge, inputs, target - before)
    ids = torch.arange(weights.shape[1], device=weights.device)
    kept = (inputs.logits > last_value) | ((inputs.logits == last_value) & (ids <= last_id))
    return _draw_by_id(weights.masked_fill_(~kept, 0.0), inputs.uniform)


def _last_kept(logits: Tensor, inputs: DrawInputs, target: Tensor) -> tuple[Tensor, Tensor]:
    """The token at which the running weight of `logits` [R, V], in the order of candidates, reaches `target` [R, 1].

    Returns:
        Its logit [R, 1] float32 and id [R, 1] int64; of the last token above -inf, should rounding put it past that.
    """
    num_rows, vocab_size = logits.shape
    last_value = torch.empty(num_rows, 1, device=logits.device)
    last_id = torch.empty(num_rows, 1, dtype=torch.int64, device=logits.device)
    rows = torch.arange(num_rows, device=logits.device)
    num_candidates = min(_NUM_EDGE_CANDIDATES, vocab_size)
    while len(rows):
        values, ids = top_candidates(logits[rows], num_candidates)
        weights = (values - inputs.peak[rows]).mul_(inputs.inverse_temperature[rows]).exp_()
        reached = torch.searchsorted(weights.double().cumsum_(dim=1), target[rows])
        place = torch.minimum(reached, (values > -torch.inf).sum(dim=1, keepdim=True) - 1)
        last_value[rows], last_id[rows] = values.gather(1, place), ids.gather(1, place)
        rows = rows[place.squeeze(1) >= num_settled(values, vocab_size)]
        num_candidates = next_num_candidates(num_candidates, vocab_size)
    return last_value, last_id


def _mass_without_top_k(inputs: DrawInputs) -> Tensor:
    """Sum of the weights that min_p leaves in the whole vocabulary; 0 where top_k makes it unnecessary. -> [R, 1]"""
    num_rows, vocab_size = inputs.logits.shape
    mass = torch.zeros(num_rows, 1, dtype=torch.float64, device=inputs.logits.device)
    rows = ((inputs.top_k >= vocab_size) & (inputs.top_p.squeeze(1) < 1.0)).nonzero().squeeze(1)
    if len(rows):
        wanted = inputs if len(rows) == num_rows else inputs.rows(rows)
        mass[rows] = _in_blocks(_weights(wanted)).sum(dim=2).double().sum(dim=1, keepdim=True)
    return mass


def _weights(inputs: DrawInputs) -> Tensor:
    """exp((l - max l) / temperature), 0 below min_p. -> [R, V] float32"""
    weights = (inputs.logits - inputs.peak).mul_(inputs.inverse_temperature).exp_()
    if bool((inputs.min_p > 0).any()):
        weights.masked_fill_(weights < inputs.min_p, 0.0)
    return weights


def _draw_by_id(weights: Tensor, uniform: Tensor) -> Tensor:
    """The first id at which the running sum of `weights` [R, V] exceeds uniform [R, 1] times their sum. -> [R]"""
    blocks = _in_blocks(weights)  # [R, num_blocks, _BLOCK]
    running = blocks.sum(dim=2).double().cumsum_(dim=1)  # [R, num_blocks]
    target = _below(running[:, -1:], uniform)  # [R, 1]
    block = torch.searchsorted(running, target, right=True)  # [R, 1]
    before = torch.where(block > 0, running.gather(1, (block - 1).clamp_(min=0)), 0.0)
    rows = torch.arange(len(blocks), device=blocks.device)
    inside = blocks[rows, block.squeeze(1)].double().cumsum_(dim=1)  # [R, _BLOCK]
    # The sums of the block in float32 and in float64 differ in the last bits: stay inside the block.
    rest = torch.minimum(target - before, _below(inside[:, -1:], 1.0))
    return (block * _BLOCK + torch.searchsorted(inside, rest, right=True)).squeeze(1)


def _in_blocks(weights: Tensor) -> Tensor:
    """[R, V] padded with 0 and split. -> [R, num_blocks, _BLOCK]"""
    padding = -weights.shape[1] % _BLOCK
    if padding:
        weights = F.pad(weights, (0, padding))
    return weights.view(len(weights), -1, _BLOCK)


def _below(total: Tensor, fraction: Tensor | float) -> Tensor:
    """fraction * total, rounded so that it stays below total."""
    return torch.minimum(total * fraction, torch.nextafter(total, torch.zeros_like(total)))

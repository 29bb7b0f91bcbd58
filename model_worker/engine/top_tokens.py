"""The most probable tokens of each row, in one order that depends on the row alone.

The order is by descending logit, equal logits by ascending id. Equal logits are common (bfloat16 keeps 8 bits), and
`torch.topk` breaks ties differently for different k and shapes; drawing from its order would let the other rows of a
batch change a token.
"""

from __future__ import annotations

import torch
from torch import Tensor

_BLOCK = 64  # tokens; blocks are compared by their maximum before tokens are
_GROWTH = 8


def top_candidates(logits: Tensor, num: int) -> tuple[Tensor, Tensor]:
    """The `num` largest logits of each row and their ids, ordered by descending logit, then ascending id.

    Of the ids that tie with the last logit any may be missing; see `num_settled`.

    Args:
        logits: [R, V] float32 without NaN.
        num: 1 ... V.

    Returns:
        values [R, num] float32 and ids [R, num] int64.
    """
    vocab_size = logits.shape[1]
    if num * _BLOCK * 4 <= vocab_size:
        values, ids = _pruned_topk(logits, num)
    elif num < vocab_size:
        values, ids = logits.topk(num, dim=1)
    else:
        return logits.sort(dim=1, descending=True, stable=True)
    # One integer key holds both orders. Adding 0.0 turns -0.0 into 0.0: they are equal but have different bits.
    bits = (values + 0.0).view(torch.int32)
    ascending = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # float order as integer order
    key = (-ascending.long() << 32) | ids  # [R, num]
    order = key.argsort(dim=1)
    return values.gather(1, order), ids.gather(1, order)


def num_settled(values: Tensor, vocab_size: int) -> Tensor:
    """How many of the leading candidates are certain to be the first ones of the whole row. -> [R] int64

    Those that tie with the last candidate are not, because another id with the same logit may be outside. A last
    candidate of -inf cannot be drawn, so that then all candidates above it are the whole row.
    """
    num = values.shape[1]
    above_last = (values > values[:, -1:]).sum(dim=1)
    if num == vocab_size:
        return torch.full_like(above_last, num)
    return torch.where(values[:, -1] == -torch.inf, num, above_last)


def top_tokens(logits: Tensor, num: int) -> tuple[Tensor, Tensor]:
    """The first `num` tokens of each row, exact in ties too. -> values [R, num] float32, ids [R, num] int64"""
    num_rows, vocab_size = logits.shape
    num = min(num, vocab_size)
    top_values = logits.new_empty(num_rows, num)
    top_ids = torch.empty(num_rows, num, dtype=torch.int64, device=logits.device)
    rows = torch.arange(num_rows, device=logits.device)
    num_candidates = min(num + 16, vocab_size)
    while len(rows):
        values, ids = top_candidates(logits[rows], num_candidates)
        top_values[rows], top_ids[rows] = values[:, :num], ids[:, :num]
        rows = rows[num_settled(values, vocab_size) < num]
        num_candidates = next_num_candidates(num_candidates, vocab_size)
    return top_values, top_ids


def top_tokens_by_key(logits: Tensor, num: int) -> tuple[Tensor, Tensor]:
    """As `top_tokens`, by one `topk` of keys that hold both orders: twice the bytes, but nothing waits for the device.

    Ids that cannot be drawn, whose logit is -inf, are in the order of the others.
    """
    vocab_size = logits.shape[1]
    ids = torch.arange(vocab_size, device=logits.device)
    bits = (logits + 0.0).view(torch.int32)
    key = ((bits ^ ((bits >> 31) & 0x7FFFFFFF)).long() << 32) | (0x7FFFFFFF - ids)  # [R, V], all distinct
    chosen = 0x7FFFFFFF - (key.topk(min(num, vocab_size), dim=1).values & 0x7FFFFFFF)
    return logits.gather(1, chosen), chosen


def next_num_candidates(num: int, vocab_size: int) -> int:
    """How many candidates to try after `num` were too few. Selecting costs much the same for any number below V."""
    return min(num * _GROWTH, vocab_size)


def _pruned_topk(logits: Tensor, num: int) -> tuple[Tensor, Tensor]:
    """`topk` that looks only at the `num` blocks with the largest maxima.

    No larger logit is elsewhere: every chosen block has a logit at least as large as anything outside, which makes
    `num` of them.
    """
    num_rows, vocab_size = logits.shape
    num_blocks = vocab_size // _BLOCK
    blocks = logits[:, : num_blocks * _BLOCK].view(num_rows, num_blocks, _BLOCK)  # [R, num_blocks, _BLOCK]
    chosen = blocks.amax(dim=2).topk(num, dim=1, sorted=False).indices  # [R, num]
    inside = torch.arange(_BLOCK, device=logits.device)
    ids = (chosen.unsqueeze(2) * _BLOCK + inside).flatten(1)  # [R, num * _BLOCK]
    tail = torch.arange(num_blocks * _BLOCK, vocab_size, device=logits.device)  # the ids after the last full block
    ids = torch.cat((ids, tail.expand(num_rows, -1)), dim=1)
    values, positions = logits.gather(1, ids).topk(num, dim=1)
    return values, ids.gather(1, positions)

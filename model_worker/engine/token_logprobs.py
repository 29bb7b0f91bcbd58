"""Logprobs of tokens and of the most probable ones beside them, in two halves: on the device, and as objects."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from typing import NamedTuple

import torch
from torch import Tensor

from model_worker.engine.outputs import TokenLogprobs, TopToken
from model_worker.engine.top_tokens import top_tokens, top_tokens_by_key


class LogprobTensors(NamedTuple):
    """Of R tokens.

    Attributes:
        tokens: [R] int64
        own: [R] float32, of these tokens.
        top_ids: [R, n] int64, of the most probable tokens.
        top: [R, n] float32, of those.
    """

    tokens: Tensor
    own: Tensor
    top_ids: Tensor
    top: Tensor

    @classmethod
    def of(cls, logits: Tensor, tokens: Tensor, num_top: int) -> LogprobTensors:
        """Of `tokens` [R] under `logits` [R, V] float32. Waits for the device only where that is the CPU."""
        logprobs = logits.log_softmax(dim=1)
        own = logprobs.gather(1, tokens.unsqueeze(1)).squeeze(1)
        # Chosen by the logits, whose rounding is the one that a greedy choice sees: log_softmax can make new ties.
        if num_top == 0:
            ids = tokens.new_empty(len(tokens), 0)
        else:
            ids = (top_tokens if logits.device.type == "cpu" else top_tokens_by_key)(logits, num_top)[1]
        return cls(tokens, own, ids, logprobs.gather(1, ids))

    def on_host(self, num_top: SequenceOf[int]) -> list[TokenLogprobs]:
        """With `num_top[r]` of the most probable tokens for row r; those that the model rules out are left out."""
        top_logprobs, top_ids = self.top.tolist(), self.top_ids.tolist()
        return [
            TokenLogprobs(
                token_id,
                logprob,
                tuple(
                    TopToken(top_ids[row][place], top_logprobs[row][place])
                    for place in range(min(num, len(top_ids[row])))
                    if top_logprobs[row][place] > -torch.inf
                ),
            )
            for row, (token_id, logprob, num) in enumerate(
                zip(self.tokens.tolist(), self.own.tolist(), num_top, strict=True)
            )
        ]

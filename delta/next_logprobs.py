"""What a model of transformers holds for likely to follow each token of a text."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


@torch.inference_mode()
def next_logprobs(model: nn.Module, token_ids: Sequence[int]) -> Tensor:
    """Natural logarithms of the probabilities of what follows each token. -> [num_tokens, vocabulary] float32"""
    logits: Tensor = model(torch.tensor([token_ids]), use_cache=False).logits[0]
    return logits.float().log_softmax(-1)

"""The input embedding of a decoder."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class EmbeddingTerms(Protocol):
    """What the variants of a step's rows change in the embedding."""

    def embed(self, input_ids: Tensor, x: Tensor, weight: Tensor) -> None:
        """Change the rows x [T, H] of the tokens [T], in place, into those of the variants.

        Args:
            weight: [V, H], of the base.
        """
        ...


class TokenEmbedding(nn.Embedding):
    """x = multiplier * weight[token]; the multiplier and the product are rounded to the weight's dtype."""

    def __init__(self, vocab_size: int, hidden_size: int, multiplier: float, *, dtype: torch.dtype) -> None:
        # A weight that is given is not drawn, for which torch would import its compiler: seconds.
        weight = torch.empty(vocab_size, hidden_size, dtype=dtype, device="meta")
        super().__init__(vocab_size, hidden_size, _weight=weight, _freeze=True)
        self.multiplier = float(torch.tensor(multiplier, dtype=dtype))

    def forward(self, input_ids: Tensor, terms: EmbeddingTerms | None = None) -> Tensor:
        """input_ids [T] -> [T, H], a new tensor"""
        if terms is None:
            x = F.embedding(input_ids, self.weight)
        else:
            # A variant may have tokens beyond the base's vocabulary; their rows are all its own.
            x = F.embedding(input_ids.clamp(max=len(self.weight) - 1), self.weight)
            terms.embed(input_ids, x, self.weight)
        return x if self.multiplier == 1.0 else x * self.multiplier

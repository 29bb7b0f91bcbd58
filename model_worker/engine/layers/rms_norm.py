"""Norms of a decoder as modules over the op's functions (`ops/rms_norm/functional.py`)."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from model_worker.engine.ops.rms_norm.functional import RowWeights, add_rms_norm, rms_norm, rms_norm_add


class NormTerms(Protocol):
    """What the variants of a step's rows change in norms."""

    def norm(self, key: str) -> RowWeights | None:
        """The weights that rows have in place of a norm's own; None: no row has."""
        ...


class RMSNorm(nn.Module):
    """The norm of each head of rows.

    Args:
        size: of the weight: that of a head, or of all heads together.
        key: its name in the model.
        dtype: of the weight: that of the rows, where they are rounded before they are multiplied with it, or float32.
    """

    def __init__(self, size: int, epsilon: float, key: str, *, dtype: torch.dtype, num_heads: int = 1) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.key = key
        self.num_heads = num_heads
        self.weight = nn.Parameter(torch.empty(size, dtype=dtype, device="meta"), requires_grad=False)

    def forward(self, x: Tensor, terms: NormTerms | None, *, out: Tensor | None = None) -> Tensor:
        """x [T, H] -> its norm, in `out` or a new tensor"""
        return rms_norm(
            x, self.weight, self.epsilon, num_heads=self.num_heads, out=out, row_weights=self.rows_of(terms)
        )

    def rows_of(self, terms: NormTerms | None) -> RowWeights | None:
        """The weights of rows that have their own."""
        return None if terms is None else terms.norm(self.key)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, {self.num_heads} heads"


class InputNorm(RMSNorm):
    """The norm before a part of a layer, which first adds to the residual what the part before it has given.

    Args:
        multiplier: of what is added.
    """

    def __init__(self, size: int, epsilon: float, key: str, *, dtype: torch.dtype, multiplier: float) -> None:
        super().__init__(size, epsilon, key, dtype=dtype)
        self.multiplier = multiplier

    def forward(self, residual: Tensor, update: Tensor | None, terms: NormTerms | None) -> Tensor:  # type: ignore[override]
        """residual [T, H] += multiplier * update, in place; then its norm. -> [T, H]"""
        rows = self.rows_of(terms)
        if update is None:
            return rms_norm(residual, self.weight, self.epsilon, row_weights=rows)
        return add_rms_norm(update, residual, self.weight, self.epsilon, multiplier=self.multiplier, row_weights=rows)


class OutputNorm(RMSNorm):
    """The norm after a part of a layer.

    Args:
        multiplier: of what is added to the residual.
    """

    def __init__(self, size: int, epsilon: float, key: str, *, dtype: torch.dtype, multiplier: float) -> None:
        super().__init__(size, epsilon, key, dtype=dtype)
        self.multiplier = multiplier

    def forward(self, x: Tensor, residual: Tensor, terms: NormTerms | None) -> None:  # type: ignore[override]
        """residual [T, H] += multiplier * the norm of x, in place."""
        rows = self.rows_of(terms)
        rms_norm_add(x, residual, self.weight, self.epsilon, multiplier=self.multiplier, row_weights=rows)

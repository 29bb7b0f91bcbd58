"""A linear layer that computes several of a checkpoint's at once, and what the rows' variants add to it."""

from __future__ import annotations

from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor

from model_worker.engine.layers.linear import Linear


class LinearTerms(Protocol):
    """What the variants of a step's rows change in linear layers."""

    def product(self, layer: FusedLinear, x: Tensor) -> Tensor:
        """The base's product of x [T, K] as the variants scale it, with those of their terms in it that `add` leaves.

        -> [T, N]
        """
        ...

    def add(self, layer: FusedLinear, x: Tensor, y: Tensor) -> None:
        """Change y [T, N] of `product`, in place, into what the variants make of x [T, K]."""
        ...


class FusedLinear(Linear):
    """Outputs of several layers, the parts, one after another.

    Attributes:
        key: its name in the model.
        widths: outputs of each part.
        columns: of the output, that each part has.
    """

    def __init__(self, in_features: int, widths: tuple[int, ...], key: str, *, bias: bool, dtype: torch.dtype) -> None:
        super().__init__(in_features, sum(widths), bias=bias, dtype=dtype, device=torch.device("meta"))
        self.key = key
        self.widths = widths
        ends = tuple(accumulate(widths))
        self.columns = tuple(slice(end - width, end) for width, end in zip(widths, ends, strict=True))

    def forward(self, x: Tensor, terms: LinearTerms | None = None) -> Tensor:
        """x [T, in] -> [T, sum of widths]"""
        if terms is None:
            return self.method.apply(self, x, self.bias)
        y = terms.product(self, x)
        terms.add(self, x, y)
        return y

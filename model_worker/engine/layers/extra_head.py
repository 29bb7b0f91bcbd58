"""The rows of an output head that a variant has beyond those of its base: tokens that were added to its vocabulary.

    y = x R^T + b        x [n, K], R [E, K], b [E]

They are few, and a product of their own: the base's head is not made wider for them.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True, slots=True, eq=False)
class ExtraHead:
    """See the module's docstring.

    Attributes:
        rows: R, in the dtype of x.
        bias: b, where the head has one.
    """

    rows: Tensor
    bias: Tensor | None = None

    @property
    def num_bytes(self) -> int:
        return self.rows.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def __call__(self, hidden: Tensor) -> Tensor:
        """hidden [n, K] -> [n, E]"""
        return F.linear(hidden, self.rows, self.bias)

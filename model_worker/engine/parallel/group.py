"""The ranks of a model, as its layers see them: sums and concatenations over all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


class RankGroup(Protocol):
    """All ranks have one, and make the same calls in the same order.

    Attributes:
        rank: of this process.
        size: number of ranks.
    """

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of all ranks' tensors of one shape, on every rank; contiguous ones are changed in place."""
        ...

    def gather_columns(self, x: Tensor, widths: Sequence[int]) -> Tensor:
        """The ranks' columns side by side, on every rank. x [..., widths[rank]] -> [..., sum(widths)]"""
        ...

    def broadcast(self, x: Tensor) -> None:
        """Rank 0's tensor, on every rank, in place."""
        ...

    def minimum(self, number: int) -> int:
        """The least of all ranks' numbers, on every rank."""
        ...


@dataclass(frozen=True, slots=True)
class OneRank:
    """A group of one: nothing is done."""

    rank: int = 0
    size: int = 1

    def all_reduce(self, x: Tensor) -> Tensor:
        return x

    def gather_columns(self, x: Tensor, widths: Sequence[int]) -> Tensor:
        return x

    def broadcast(self, x: Tensor) -> None:
        pass

    def minimum(self, number: int) -> int:
        return number

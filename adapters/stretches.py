"""Of a weight the stretches that somebody wants, such as those of one rank: the rest need not be read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from compression.grouped_weight import GROUP, GroupedWeight


@dataclass(frozen=True, slots=True)
class Stretches:
    """Some of one axis of a tensor, put side by side; of all other axes everything.

    Attributes:
        axis: counted from 0.
        ranges: (start, end) of each stretch, in the order in which they are wanted; at least one.
    """

    axis: int
    ranges: tuple[tuple[int, int], ...]

    def size(self) -> int:
        """Of the axis, afterwards."""
        return sum(end - start for start, end in self.ranges)

    def of_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (*shape[: self.axis], self.size(), *shape[self.axis + 1 :])

    def are_multiples_of(self, number: int) -> bool:
        return all(start % number == 0 == end % number for start, end in self.ranges)

    def in_units_of(self, number: int) -> Stretches:
        """The same of a tensor whose axis counts so many numbers as one."""
        assert self.are_multiples_of(number)
        return Stretches(self.axis, tuple((start // number, end // number) for start, end in self.ranges))

    def cut(self, tensor: Tensor) -> Tensor:
        """A view of the tensor where they are one stretch, else a new one."""
        pieces = [tensor.narrow(self.axis, start, end - start) for start, end in self.ranges]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=self.axis)

    def cut_grouped(self, weight: GroupedWeight) -> GroupedWeight | Tensor:
        """Still quantized, unless a group of inputs would be cut."""
        if self.axis == 0:
            return weight.map_rows(self.cut)
        if not self.are_multiples_of(GROUP):
            return self.cut(weight.dequantize())
        groups = self.in_units_of(GROUP)
        minimums = None if weight.minimums is None else groups.cut(weight.minimums)
        return GroupedWeight(self.cut(weight.values), groups.cut(weight.scales), minimums)


Select = Callable[[str, tuple[int, ...]], Stretches | None]
"""What is wanted of a weight of this name and shape; None: all of it."""


def select_all(name: str, shape: tuple[int, ...]) -> None:
    """Every weight is wanted whole."""

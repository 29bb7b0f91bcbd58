"""How weights are divided among ranks, as data.

A weight is whole on every rank, or one axis of it is divided. An axis consists of parts, each of which every rank gets
a stretch of; a part consists of units that stay together, such as the numbers of one attention head:

    packed qkv, 4 heads, 2 KV heads     | q0 q1 q2 q3 | k0 k1 | v0 v1 |        rank 0 of 2: | q0 q1 | k0 | v0 |

By outputs means that ranks compute different outputs from the same inputs; by inputs, that each has some of the inputs
and the ranks' outputs are added up. What such a layer adds to its outputs, its bias, is then only rank 0's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from adapters.stretches import Stretches
from compression.grouped_weight import GROUP
from registry.errors import UnsupportedModelError

_MOST_RANKS = 64


@dataclass(frozen=True, slots=True)
class Part:
    """A stretch of an axis.

    Attributes:
        size: numbers in it.
        num_units: of equal size.
        what: the units, for people.
        repeats: where there are fewer units than ranks, several ranks have the same one.
        uneven: ranks may have different numbers of units.
    """

    size: int
    num_units: int
    what: str
    repeats: bool = False
    uneven: bool = False

    def allows(self, num_ranks: int) -> bool:
        if self.uneven or self.num_units % num_ranks == 0:
            return True
        return self.repeats and num_ranks % self.num_units == 0

    def stretch(self, rank: int, num_ranks: int) -> tuple[int, int]:
        """(start, end) of what a rank has, within the part."""
        unit = self.size // self.num_units
        if self.repeats and self.num_units < num_ranks:
            first = rank * self.num_units // num_ranks
            return first * unit, (first + 1) * unit
        return rank * self.num_units // num_ranks * unit, (rank + 1) * self.num_units // num_ranks * unit


@dataclass(frozen=True, slots=True)
class Share:
    """Which of the ranks this is."""

    rank: int
    num_ranks: int


@dataclass(frozen=True, slots=True)
class Division:
    """A divided axis of [N, K] (outputs, inputs), or of a vector [N].

    Attributes:
        by_inputs: K is divided; else N.
        parts: of the axis, in order.
    """

    by_inputs: bool
    parts: tuple[Part, ...]

    def ranges(self, share: Share) -> list[tuple[int, int]]:
        """What a rank has of the whole axis, in order; stretches that touch are one."""
        found: list[tuple[int, int]] = []
        start_of_part = 0
        for part in self.parts:
            start, end = (start_of_part + place for place in part.stretch(share.rank, share.num_ranks))
            if found and found[-1][1] == start:
                found[-1] = (found[-1][0], end)
            else:
                found.append((start, end))
            start_of_part += part.size
        return found

    def stretches(self, share: Share, axis: int) -> Stretches:
        """The same of a tensor that is divided along `axis`, counted from 0."""
        return Stretches(axis, tuple(self.ranges(share)))

    def size(self, share: Share) -> int:
        return sum(end - start for start, end in self.ranges(share))

    def part(self, index: int) -> Division:
        """Of a weight that consists of one part only."""
        return Division(self.by_inputs, (self.parts[index],))


def outputs(*parts: Part) -> Division:
    return Division(False, parts)


def inputs(*parts: Part) -> Division:
    return Division(True, parts)


def cut(tensor: Tensor, axis: int, division: Division, share: Share) -> Tensor:
    """What a rank has of a tensor whose `axis` is divided; a view of it where that is one stretch."""
    return division.stretches(share, axis).cut(tensor)


def check_divisible(parts: Iterable[Part], num_ranks: int) -> None:
    """Raises UnsupportedModelError where something cannot be divided, and says what else is possible."""
    parts = list(dict.fromkeys(parts))
    against = next((part for part in parts if not part.allows(num_ranks)), None)
    if against is None:
        return
    possible = [number for number in range(1, _MOST_RANKS + 1) if all(part.allows(number) for part in parts)]
    raise UnsupportedModelError(
        f"--tensor-parallel-size {num_ranks} is not possible for this model: its {against.num_units} {against.what} "
        f"cannot be divided among {num_ranks}. Possible are {_listed(possible)}."
    )


def check_divisions(divisions: Mapping[str, Division], num_ranks: int) -> None:
    """The same for all weights of a model."""
    check_divisible((part for division in divisions.values() for part in division.parts), num_ranks)


def check_groups(divisions: Mapping[str, Division], num_ranks: int) -> None:
    """The same for the quantized weights of a model, whose groups of inputs stay whole."""
    check_divisible(
        (
            Part(part.size, max(1, part.size // GROUP), f"groups of {GROUP} {part.what}")
            for division in divisions.values()
            if division.by_inputs
            for part in division.parts
        ),
        num_ranks,
    )


def _listed(numbers: Sequence[int]) -> str:
    return " and ".join([", ".join(map(str, numbers[:-1])), str(numbers[-1])]) if len(numbers) > 1 else str(numbers[0])

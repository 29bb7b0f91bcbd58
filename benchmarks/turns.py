"""Loads that are compared run in turns, round by round, so that whatever else the machine does falls on all of them."""

from __future__ import annotations

import statistics
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from serve import LevelResult


@dataclass(frozen=True, slots=True)
class Side:
    """One of the loads that are compared.

    Attributes:
        models: of the requests, in turn.
    """

    name: str
    url: str
    models: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Comparison:
    """Attributes:
    ratios: throughput of each side over that of the first one, the median of the rounds.
    rounds: by side, one result a round.
    """

    streams: int
    tokens_per_s: dict[str, float]
    ratios: dict[str, float]
    rounds: dict[str, list[LevelResult]]


async def compare(
    run: Callable[[Side, int], Awaitable[LevelResult]], streams: int, sides: Sequence[Side], rounds: int
) -> Comparison:
    """Run every side once in each of so many rounds; `run` gets the side and the round's number."""
    results: dict[str, list[LevelResult]] = {side.name: [] for side in sides}
    for number in range(rounds):
        for side in sides:
            results[side.name].append(await run(side, number))
    first = results[sides[0].name]

    def median_ratio(name: str) -> float:
        pairs = zip(results[name], first, strict=True)
        return statistics.median(one.output_tokens_per_s / base.output_tokens_per_s for one, base in pairs)

    return Comparison(
        streams,
        {name: statistics.median(one.output_tokens_per_s for one in found) for name, found in results.items()},
        {name: median_ratio(name) for name in results},
        results,
    )

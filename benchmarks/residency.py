"""Which adapters stay active: the engine's residency policy beside LRU, LFU and Belady's optimum, simulated.

    python benchmarks/residency.py --json results.json

Requests come one after the other to `--num-variants` variants, of which `--budget` fit; a request for one that is not
there is a miss, brings it in, and one makes room. Nothing waits, so no policy sees what comes, but for the optimum,
which throws out what will not be asked for again for the longest time (Belady, IBM Systems Journal 1966). All variants
are of one size. Two traces, from a seeded generator:

    stationary    Zipf 1.0
    drifting      Zipf 0.9, where `--drift-places` pairs of the ranking change places every `--drift-every` requests

The policy is the engine's own code (`engine/lora/residency.py`), on the clock of `--requests-per-s`. Hits are counted
after the first `--warm-up` requests. Same arguments, same figures: nothing is timed.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from typing import Protocol

from arguments import new_file
from report import describe_run, now, write_report

from model_worker.engine.lora.residency import RequestRate, Resident, choose_victims, value_of_keeping


class Policy(Protocol):
    """Chooses who makes room."""

    def request(self, position: int, variant: int) -> None:
        """The request at a position of the trace is for a variant."""
        ...

    def victim(self, resident: set[int], position: int) -> int: ...


class EnginePolicy:
    """Variants of one size and one load time."""

    def __init__(self, num_variants: int, requests_per_s: float) -> None:
        self._rates = [RequestRate() for _ in range(num_variants)]
        self._requests_per_s = requests_per_s

    def request(self, position: int, variant: int) -> None:
        self._rates[variant].observe(position / self._requests_per_s)

    def victim(self, resident: set[int], position: int) -> int:
        now_s = position / self._requests_per_s
        found = choose_victims(
            (
                Resident(
                    variant,
                    value_of_keeping(rate=self._rates[variant].at(now_s), num_waiting=0, reload_s=0.1, num_bytes=1),
                    variant,
                    1,
                )
                for variant in resident
            ),
            num_places=1,
            num_bytes=0,
        )
        assert found is not None
        return found[0]


class LeastRecentlyUsed:
    def __init__(self) -> None:
        self._last: dict[int, int] = {}

    def request(self, position: int, variant: int) -> None:
        self._last[variant] = position

    def victim(self, resident: set[int], position: int) -> int:
        return min(resident, key=self._last.__getitem__)


class LeastFrequentlyUsed:
    """Counts of all requests, for ever; the least recently used of equals."""

    def __init__(self) -> None:
        self._used: dict[int, tuple[int, int]] = {}

    def request(self, position: int, variant: int) -> None:
        count, _ = self._used.get(variant, (0, 0))
        self._used[variant] = (count + 1, position)

    def victim(self, resident: set[int], position: int) -> int:
        return min(resident, key=self._used.__getitem__)


class Optimum:
    """Knows the trace."""

    def __init__(self, trace: Sequence[int]) -> None:
        self._next_use = next_uses(trace)
        self._next: dict[int, int] = {}

    def request(self, position: int, variant: int) -> None:
        self._next[variant] = self._next_use[position]

    def victim(self, resident: set[int], position: int) -> int:
        return max(resident, key=lambda variant: (self._next[variant], variant))


def next_uses(trace: Sequence[int]) -> list[int]:
    """For each position, the next one of the same variant, or the trace's length."""
    following: dict[int, int] = {}
    found = [0] * len(trace)
    for position in reversed(range(len(trace))):
        found[position] = following.get(trace[position], len(trace))
        following[trace[position]] = position
    return found


def count_hits(trace: Sequence[int], budget: int, policy: Policy, *, warm_up: int = 0) -> int:
    """Hits from position `warm_up` on."""
    resident: set[int] = set()
    hits = 0
    for position, variant in enumerate(trace):
        policy.request(position, variant)
        if variant in resident:
            hits += position >= warm_up
            continue
        if len(resident) == budget:
            resident.remove(policy.victim(resident, position))
        resident.add(variant)
    return hits


def zipf_trace(
    num_variants: int, num_requests: int, exponent: float, *, seed: int, drift_every: int = 0, drift_places: int = 0
) -> list[int]:
    """Variant r is asked for in proportion to 1 / (rank of r)^exponent.

    Args:
        drift_every: requests after which the ranking changes; 0: never.
        drift_places: so many pairs, chosen at random, then change places.
    """
    chance = random.Random(seed)
    ranking = list(range(num_variants))
    chance.shuffle(ranking)
    weights = list(accumulate((rank + 1) ** -exponent for rank in range(num_variants)))
    trace = []
    for position in range(num_requests):
        if drift_every and position and position % drift_every == 0:
            for _ in range(drift_places):
                a, b = chance.randrange(num_variants), chance.randrange(num_variants)
                ranking[a], ranking[b] = ranking[b], ranking[a]
        trace.append(ranking[bisect_left(weights, chance.random() * weights[-1])])
    return trace


@dataclass(frozen=True, slots=True)
class TraceResult:
    """Shares of the requests that were hits, and of the optimum's hits that the engine's policy has."""

    trace: str
    engine: float
    lru: float
    lfu: float
    optimum: float
    engine_of_optimum: float


def measure(name: str, trace: Sequence[int], options: argparse.Namespace) -> TraceResult:
    policies: dict[str, Policy] = {
        "engine": EnginePolicy(options.num_variants, options.requests_per_s),
        "lru": LeastRecentlyUsed(),
        "lfu": LeastFrequentlyUsed(),
        "optimum": Optimum(trace),
    }
    hits = {
        policy: count_hits(trace, options.budget, code, warm_up=options.warm_up) for policy, code in policies.items()
    }
    counted = len(trace) - options.warm_up
    shares = {policy: round(count / counted, 4) for policy, count in hits.items()}
    return TraceResult(trace=name, **shares, engine_of_optimum=round(hits["engine"] / hits["optimum"], 4))


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="residency.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--num-variants", type=int, default=1000)
    parser.add_argument("--budget", type=int, default=100, help="variants that fit")
    parser.add_argument("--num-requests", type=int, default=60_000)
    parser.add_argument("--warm-up", type=int, default=10_000)
    parser.add_argument("--requests-per-s", type=float, default=10.0)
    parser.add_argument("--drift-every", type=int, default=500, help="requests between changes of the ranking")
    parser.add_argument("--drift-places", type=int, default=5, help="pairs that change places then")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=new_file, help="file for settings and results")
    options = parser.parse_args(arguments)
    started_at = now()
    size = (options.num_variants, options.num_requests)
    traces = {
        "stationary": zipf_trace(*size, 1.0, seed=options.seed),
        "drifting": zipf_trace(
            *size, 0.9, seed=options.seed, drift_every=options.drift_every, drift_places=options.drift_places
        ),
    }
    results = []
    for name, trace in traces.items():
        results.append(measure(name, trace, options))
        print(json.dumps(asdict(results[-1])), flush=True)
    if options.json is not None:
        settings = {name: value for name, value in vars(options).items() if name != "json"}
        report = {
            **describe_run("residency.py", arguments, started_at),
            "settings": settings,
            "traces": [asdict(result) for result in results],
        }
        write_report(report, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

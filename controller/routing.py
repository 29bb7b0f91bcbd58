"""Which replica gets a request: pure policies over the workers that can take it.

A policy is a callable `(candidates, affinity) -> worker`; `candidates` is never empty. To add one, write the class and
name it in POLICIES and in the choices of `WorkerConfig.routing`.

The load of a worker is its number of requests (running, waiting, and given to it since its last heartbeat) divided by
its KV blocks relative to the largest candidate's, so that a replica with twice the memory gets twice the requests.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from controller.protocol import VariantState
from controller.workers import Worker


class RoutingPolicy(Protocol):
    def __call__(self, candidates: Sequence[Worker], affinity: str | None) -> Worker: ...


def loads(candidates: Sequence[Worker]) -> list[float]:
    """The load of each candidate, in requests of the largest one; raw counts where one reports no KV blocks."""
    largest = max(worker.stats.kv_blocks_total for worker in candidates)
    if min(worker.stats.kv_blocks_total for worker in candidates) <= 0:
        return [float(worker.num_requests) for worker in candidates]
    return [worker.num_requests * largest / worker.stats.kv_blocks_total for worker in candidates]


class LeastLoad:
    """The candidate with the least load; ties are drawn.

    With an `affinity` key (the same for requests that share a prefix) the candidate that the key hashes to is taken
    instead, as long as its load is at most `affinity_slack` requests above the least: a cached prefix is worth a short
    wait, not a long one.
    """

    affinity_slack = 4.0

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng

    def __call__(self, candidates: Sequence[Worker], affinity: str | None) -> Worker:
        load = loads(candidates)
        least = min(load)
        if affinity is not None:
            preferred = max(range(len(candidates)), key=lambda i: _rendezvous(affinity, candidates[i].worker_id))
            if load[preferred] <= least + self.affinity_slack:
                return candidates[preferred]
        return self._rng.choice([worker for worker, value in zip(candidates, load, strict=True) if value == least])


class Lottery:
    """A draw in which a worker's chance is proportional to 1 / (1 + load)."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng

    def __call__(self, candidates: Sequence[Worker], affinity: str | None) -> Worker:
        return self._rng.choices(candidates, weights=[1.0 / (1.0 + load) for load in loads(candidates)])[0]


class RoundRobin:
    """The candidate that was chosen longest ago; never chosen ones first, in the order given."""

    def __init__(self, rng: random.Random) -> None:
        self._turn = 0
        self._chosen: dict[str, int] = {}

    def __call__(self, candidates: Sequence[Worker], affinity: str | None) -> Worker:
        chosen = min(candidates, key=lambda worker: self._chosen.get(worker.worker_id, -1))
        present = {worker.worker_id for worker in candidates}
        if len(self._chosen) > 16 * len(present) + 256:  # workers come and go under new ids; forget those that went
            self._chosen = {key: turn for key, turn in self._chosen.items() if key in present}
        self._chosen[chosen.worker_id] = self._turn
        self._turn += 1
        return chosen


TIERS: dict[VariantState, int] = {"active": 0, "in_host_memory": 1, "on_disk": 2}
"""How far a variant is from being used on a worker; less is nearer. In states that are not here it cannot be used."""

_ON_DISK = TIERS["on_disk"]
RESIDENCY_SLACK = 8.0  # requests; benchmarks/variant_routing.py: less costs hits, more gains no time


class VariantRouting:
    """Which replica gets a request for variants. With

        tier(w) = the largest of TIERS[state on w] over the variants asked for
        near    = {w : load(w) ≤ min load + RESIDENCY_SLACK}
        pool    = {w ∈ near : tier(w) = min over near of tier}

    it is the one of `pool` that the policy for the plain model chooses. So a worker where the variant is ready gets its
    requests as long as it is not much busier than another one; when it is, the variant becomes ready on a second one
    too, and from then on both share its requests. What is in no memory of a near worker is brought to the one that its
    name hashes to (that is the affinity then), so that the rare variants are dealt out among the replicas' memories;
    elsewhere variant and prompt make the affinity, because a cached prefix belongs to both.
    """

    def __init__(self, policy: RoutingPolicy) -> None:
        self._policy = policy

    def __call__(self, candidates: Sequence[Worker], variants: Sequence[str], affinity: str | None) -> Worker:
        """Args:
        candidates: workers that have all `variants` in a state of TIERS.
        """
        load = loads(candidates)
        bound = min(load) + RESIDENCY_SLACK
        near = [worker for worker, value in zip(candidates, load, strict=True) if value <= bound]
        tiers = [tier(worker, variants) for worker in near]
        best = min(tiers)
        pool = [worker for worker, value in zip(near, tiers, strict=True) if value == best]
        named = "\0".join(sorted(variants))
        if best == _ON_DISK:
            return self._policy(pool, named)
        return self._policy(pool, None if affinity is None else f"{named}\0{affinity}")


def tier(worker: Worker, variants: Iterable[str]) -> int:
    return max(TIERS[worker.variants[name].state] for name in variants)


POLICIES: dict[str, Callable[[random.Random], RoutingPolicy]] = {
    "least_load": LeastLoad,
    "lottery": Lottery,
    "round_robin": RoundRobin,
}


def create_policy(name: str, rng: random.Random) -> RoutingPolicy:
    return POLICIES[name](rng)


def _rendezvous(affinity: str, worker_id: str) -> bytes:
    """Highest-random-weight hashing: a worker that joins or leaves moves only the keys that it wins or loses."""
    return hashlib.blake2b(f"{affinity}\0{worker_id}".encode(), digest_size=8).digest()

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given, strategies as st

from controller.protocol import WorkerStats
from controller.routing import POLICIES, LeastLoad, Lottery, RoundRobin, create_policy, loads
from controller.workers import Worker


def worker(worker_id: str, *, running: int = 0, waiting: int = 0, blocks: int = 16) -> Worker:
    stats = WorkerStats(num_running=running, num_waiting=waiting, kv_blocks_total=blocks)
    return Worker(worker_id, f"http://{worker_id}", (), stats, 0.0)


fleets = st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50), st.integers(0, 64)), min_size=1, max_size=8).map(
    lambda parts: [worker(f"w{i}", running=r, waiting=w, blocks=b) for i, (r, w, b) in enumerate(parts)]
)


@given(st.sampled_from(sorted(POLICIES)), fleets, st.none() | st.text(max_size=5), st.integers())
def test_every_policy_chooses_a_candidate_and_repeats_itself_from_the_same_seed(name, fleet, affinity, seed) -> None:
    def choices() -> list[str]:
        policy = create_policy(name, random.Random(seed))
        return [policy(fleet, affinity).worker_id for _ in range(5)]

    chosen = choices()
    assert set(chosen) <= {candidate.worker_id for candidate in fleet}
    assert chosen == choices()


@given(fleets, st.integers())
def test_least_load_never_takes_a_busier_one(fleet, seed) -> None:
    chosen = LeastLoad(random.Random(seed))(fleet, None)
    assert loads(fleet)[fleet.index(chosen)] == min(loads(fleet))


def test_least_load_spreads_ties() -> None:
    fleet = [worker("a"), worker("b")]
    policy = LeastLoad(random.Random(0))
    assert {policy(fleet, None).worker_id for _ in range(50)} == {"a", "b"}


def test_load_is_relative_to_the_kv_memory() -> None:
    assert loads([worker("big", running=4, blocks=200), worker("small", running=4, blocks=100)]) == [4.0, 8.0]
    assert loads([worker("a", running=4, blocks=0), worker("b", running=1, waiting=2, blocks=100)]) == [4.0, 3.0]


def test_affinity_holds_until_the_replica_is_much_busier() -> None:
    fleet = [worker("a"), worker("b"), worker("c")]
    policy = LeastLoad(random.Random(0))
    (home,) = {policy(fleet, "conversation").worker_id for _ in range(20)}
    others = [w for w in fleet if w.worker_id != home]
    busy = worker(home, running=4)
    assert policy([*others, busy], "conversation") is busy
    assert policy([*others, worker(home, running=5)], "conversation") in others
    assert {policy(fleet, f"conversation {i}").worker_id for i in range(50)} == {"a", "b", "c"}


@given(st.integers(2, 6), st.text(min_size=1, max_size=8))
def test_affinity_moves_only_when_its_own_replica_leaves(num_workers: int, key: str) -> None:
    fleet = [worker(f"w{i}") for i in range(num_workers)]
    policy = LeastLoad(random.Random(0))
    home = policy(fleet, key)
    for leaving in fleet:
        if leaving is not home:
            assert policy([w for w in fleet if w is not leaving], key) is home


def test_lottery_prefers_idle_workers() -> None:
    fleet = [worker("idle"), worker("busy", running=9)]
    policy = Lottery(random.Random(0))
    drawn = Counter(policy(fleet, None).worker_id for _ in range(2000))
    assert drawn["busy"] > 0
    assert drawn["idle"] / drawn["busy"] == pytest.approx(10, rel=0.5)


@given(st.integers(1, 6), st.integers(1, 5))
def test_round_robin_is_even(num_workers: int, rounds: int) -> None:
    fleet = [worker(f"w{i}", running=i) for i in range(num_workers)]
    policy = RoundRobin(random.Random(0))
    drawn = Counter(policy(fleet, None).worker_id for _ in range(num_workers * rounds))
    assert set(drawn.values()) == {rounds}
    assert len(drawn) == num_workers


def test_round_robin_forgets_workers_that_left() -> None:
    policy = RoundRobin(random.Random(0))
    for i in range(2000):
        policy([worker(f"w{i}")], None)
    assert len(policy._chosen) < 500

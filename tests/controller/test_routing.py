from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given, strategies as st

from controller.protocol import VariantStatus, WorkerStats
from controller.routing import (
    POLICIES,
    RESIDENCY_SLACK,
    TIERS,
    LeastLoad,
    Lottery,
    RoundRobin,
    VariantRouting,
    create_policy,
    loads,
    tier,
)
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


def holding(worker_id: str, *, running: int = 0, **states: str) -> Worker:
    """A worker with variants, name=state."""
    holder = worker(worker_id, running=running)
    holder.variants = {
        name: VariantStatus(name=name, parent="m", path=name, state=state) for name, state in states.items()
    }
    return holder


def variant_routing(seed: int = 0) -> VariantRouting:
    return VariantRouting(LeastLoad(random.Random(seed)))


def test_a_variant_goes_where_it_is_nearest_to_being_used() -> None:
    states = ("in_host_memory", "active", "on_disk")
    fleet = [holding(state, sql=state) for state in states]
    assert variant_routing()(fleet, ["sql"], "prompt").worker_id == "active"
    assert variant_routing()([w for w in fleet if w.worker_id != "active"], ["sql"], None).worker_id == "in_host_memory"


def test_all_of_several_variants_count() -> None:
    fleet = [holding("half", a="active", b="on_disk"), holding("whole", a="in_host_memory", b="in_host_memory")]
    assert [tier(w, ["a", "b"]) for w in fleet] == [TIERS["on_disk"], TIERS["in_host_memory"]]
    assert variant_routing()(fleet, ["a", "b"], None).worker_id == "whole"


def test_a_hot_variant_spreads_when_its_worker_is_much_busier() -> None:
    slack = int(RESIDENCY_SLACK)
    other = holding("other", sql="on_disk")
    for running, chosen in ((slack, "home"), (slack + 1, "other")):
        fleet = [holding("home", running=running, sql="active"), other]
        assert variant_routing()(fleet, ["sql"], None).worker_id == chosen
    both = [holding("home", running=2, sql="active"), holding("other", running=1, sql="active")]
    assert variant_routing()(both, ["sql"], None).worker_id == "other"


def test_variants_in_no_memory_are_dealt_out_by_name_whatever_the_prompt() -> None:
    names = [f"v{i}" for i in range(60)]
    fleet = [holding(f"w{i}", **dict.fromkeys(names, "on_disk")) for i in range(3)]
    homes = {name: {variant_routing(i)(fleet, [name], f"prompt {i}").worker_id for i in range(5)} for name in names}
    assert all(len(workers) == 1 for workers in homes.values())
    assert {next(iter(workers)) for workers in homes.values()} == {"w0", "w1", "w2"}


def test_prefix_affinity_among_those_that_are_ready_belongs_to_variant_and_prompt() -> None:
    fleet = [holding(f"w{i}", a="active", b="active") for i in range(4)]
    prompts = [f"prompt {i}" for i in range(40)]
    homes = {name: [variant_routing()(fleet, [name], prompt).worker_id for prompt in prompts] for name in "ab"}
    assert set(homes["a"]) == {"w0", "w1", "w2", "w3"}
    assert homes["a"] == [variant_routing(7)(fleet, ["a"], prompt).worker_id for prompt in prompts]
    assert homes["a"] != homes["b"]


@given(
    st.sampled_from(sorted(POLICIES)),
    st.lists(st.tuples(st.integers(0, 12), st.sampled_from(sorted(TIERS))), min_size=1, max_size=6),
    st.none() | st.text(max_size=3),
)
def test_the_chosen_worker_is_near_and_no_near_one_is_readier(name, parts, affinity) -> None:
    fleet = [holding(f"w{i}", running=running, v=state) for i, (running, state) in enumerate(parts)]
    chosen = VariantRouting(create_policy(name, random.Random(0)))(fleet, ["v"], affinity)
    least = min(w.num_requests for w in fleet)
    near = [w for w in fleet if w.num_requests <= least + RESIDENCY_SLACK]
    assert chosen in near
    assert tier(chosen, ["v"]) == min(tier(w, ["v"]) for w in near)

from __future__ import annotations

from pathlib import Path

import pytest

from model_worker.engine.lora.lora_weight import LoraWeight
from registry.errors import (
    InsufficientMemoryError,
    InvalidRequestError,
    ModelNotFoundError,
)
from tests.fakes.fake_adapters import FakeAdapters, FakeTerms, ManualWork, make_manager, settle
from tests.fakes.lora_requests import added, error_of, request, run, states

# ---------------------------------------------------------------------------------------------- places


def test_the_least_valued_that_does_not_run_makes_room() -> None:
    adapters = FakeAdapters()
    manager = make_manager(adapters, max_loras=2)
    added(manager, adapters, "a", "b", "c")
    for name in ("a", "b", "b", "a", "a"):
        manager.leave(run(manager, name))
    run(manager, "c")
    assert states(manager) == {"a": "active", "b": "in_host_memory", "c": "active"}


def test_what_runs_and_what_is_pinned_stays() -> None:
    adapters = FakeAdapters()
    manager = make_manager(adapters, max_loras=2)
    added(manager, adapters, "pinned", pinned=True)
    added(manager, adapters, "a", "b")
    running = run(manager, "a")
    waiting = request(manager, "b")
    settle(manager)
    assert not manager.admits(waiting)
    manager.leave(running)
    settle(manager)
    assert manager.admits(waiting)
    assert states(manager) == {"pinned": "active", "a": "in_host_memory", "b": "active"}
    assert manager.statuses()[0].evictions_total == 0
    assert isinstance(error_of(manager.evict("pinned")), InvalidRequestError)
    manager.enter(waiting)
    assert isinstance(error_of(manager.deactivate("b")), InvalidRequestError)


def test_bytes_are_a_limit_too_and_host_memory_gives_way_first() -> None:
    adapters = FakeAdapters()
    manager = make_manager(adapters, max_loras=8, memory_bytes=45)
    added(manager, adapters, "a", "b", "c")
    manager.leave(run(manager, "a"))
    assert states(manager) == {"a": "active", "b": "in_host_memory", "c": "in_host_memory"}
    manager.leave(run(manager, "b"))
    assert states(manager) == {"a": "active", "b": "active", "c": "on_disk"}
    manager.leave(run(manager, "c"))
    assert sorted(states(manager).values()) == ["active", "active", "on_disk"]
    assert states(manager)["c"] == "active"


def test_a_pin_that_does_not_fit_is_refused_when_asked_for() -> None:
    adapters = FakeAdapters()
    manager = make_manager(adapters, max_loras=1)
    added(manager, adapters, "a", pinned=True)
    added(manager, adapters, "b")
    assert isinstance(error_of(manager.pin("b")), InsufficientMemoryError)
    refused = manager.add("c", adapters.write("c"), pinned=True)
    settle(manager)
    assert isinstance(error_of(refused), InsufficientMemoryError)
    assert states(manager) == {"a": "active", "b": "in_host_memory"}
    with pytest.raises(InsufficientMemoryError, match="pinned"):
        manager.resolve([LoraWeight("b")])
    manager.unpin("a")
    run(manager, "b")


def test_requests_that_a_pin_leaves_without_a_place_end_with_an_error() -> None:
    adapters = FakeAdapters()
    manager = make_manager(adapters, max_loras=1)
    added(manager, adapters, "a", "b")
    running = run(manager, "a")
    waiting = request(manager, "b")
    assert manager.pin("a").result(0).pinned
    ((sequence, error),) = manager.advance()
    assert sequence is waiting
    assert isinstance(error, InsufficientMemoryError)
    manager.leave(waiting)
    manager.leave(running)
    manager.check_idle()


def test_an_adapter_larger_than_all_memory_is_refused() -> None:
    adapters = FakeAdapters()
    manager = make_manager(adapters, memory_bytes=19)
    reply = manager.add("a", adapters.write("a"))
    settle(manager)
    assert "--lora-memory-gib" in error_of(reply).message


def test_one_that_turns_out_larger_than_it_was_taken_for_goes_or_fails() -> None:
    adapters = FakeAdapters()
    manager = make_manager(adapters, memory_bytes=50)
    manager.add("a", adapters.write("a", FakeTerms("sha256:a", bound_bytes=41)))
    settle(manager)
    waiting = request(manager, "a")
    for _ in range(4):
        doomed = manager.advance()
        if doomed:
            break
    assert isinstance(doomed[0][1], InsufficientMemoryError)
    manager.leave(waiting)
    assert waiting.variant is not None
    assert waiting.variant.bound is None
    manager.check_integrity((), ())


def test_a_place_is_emptied_for_who_has_waited_too_long() -> None:
    adapters = FakeAdapters()
    manager = make_manager(adapters, max_loras=1, patience_s=1.0)
    added(manager, adapters, "hot", "rare")
    first = run(manager, "hot")
    rare = request(manager, "rare")
    settle(manager)
    second = request(manager, "hot")
    assert manager.admits(second)
    assert not manager.holds_up(rare)
    adapters.clock.advance(1.0)
    settle(manager)
    assert manager.holds_up(rare)
    assert not manager.admits(second)
    urgent = request(manager, "hot", priority=-1)
    assert manager.admits(urgent)
    manager.leave(urgent)
    manager.leave(first)
    settle(manager)
    assert manager.admits(rare)
    manager.enter(rare)
    settle(manager)
    manager.leave(rare)
    settle(manager)
    assert manager.admits(second)


def test_a_place_is_open_again_when_nobody_waits_for_it_any_more() -> None:
    adapters = FakeAdapters()
    manager = make_manager(adapters, max_loras=1, patience_s=0.0)
    added(manager, adapters, "hot", "rare")
    run(manager, "hot")
    rare = request(manager, "rare")
    settle(manager)
    second = request(manager, "hot")
    assert not manager.admits(second)
    manager.leave(rare)
    settle(manager)
    assert manager.admits(second)


def test_what_waits_is_prefetched_to_host_memory() -> None:
    adapters = FakeAdapters()
    manager = make_manager(adapters, max_loras=1)
    added(manager, adapters, "a", "b")
    run(manager, "a")
    manager.evict("b").result(0)
    assert states(manager)["b"] == "on_disk"
    request(manager, "b")
    settle(manager)
    assert states(manager)["b"] == "in_host_memory"


def test_requests_are_loaded_for_in_their_order_and_additions_get_their_turn() -> None:
    work = ManualWork()
    adapters = FakeAdapters()
    manager = make_manager(adapters, work, max_loras=8)
    for name in "abcdefg":
        manager.add(name, adapters.write(name))
    settle(manager, work)
    for name in "gfedcba":
        request(manager, name)
    addition = manager.add("z", adapters.write("z"))
    order: list[str] = []
    while "z" not in states(manager) or not addition.done() or len(order) < 7:
        manager.advance()
        work.work()
        order += [name for name, state in states(manager).items() if state == "active" and name not in order]
        if addition.done() and "z" not in order:
            order.append("z")
    assert order.index("g") < order.index("d") < order.index("a")
    assert order.index("z") < order.index("a")


def test_activate_and_deactivate_and_evict() -> None:
    adapters = FakeAdapters()
    manager = make_manager(adapters, max_loras=1)
    added(manager, adapters, "a", "b")
    reply = manager.activate("a")
    settle(manager)
    assert reply.result(0).state == "active"
    assert manager.activate("a").result(0).state == "active"
    reply = manager.activate("b")
    settle(manager)
    assert reply.result(0).state == "active"
    assert manager.deactivate("b").result(0).state == "in_host_memory"
    assert manager.evict("b").result(0).state == "on_disk"
    assert isinstance(error_of(manager.activate("c")), ModelNotFoundError)


def test_an_activation_waits_for_a_place_and_gets_it() -> None:
    adapters = FakeAdapters()
    manager = make_manager(adapters, max_loras=1)
    added(manager, adapters, "a", "b")
    running = run(manager, "a")
    reply = manager.activate("b")
    settle(manager)
    assert not reply.done()
    later = request(manager, "a")
    assert not manager.admits(later)
    manager.leave(running)
    settle(manager)
    assert reply.result(0).state == "active"


# ---------------------------------------------------------------------------------------------- in place


def test_what_is_bound_in_host_memory_is_active_at_once_and_takes_nothing_more() -> None:
    work = ManualWork()
    adapters = FakeAdapters()
    manager = make_manager(adapters, work, max_loras=1, memory_bytes=20, binds_in_place=True)
    for name in "ab":
        manager.add(name, adapters.write(name))
    settle(manager, work)
    for name, other in ("ab", "ba"):
        reply = manager.activate(name)
        manager.advance()
        assert reply.result(0).active_bytes == 0
        assert states(manager) == {name: "active", other: "in_host_memory"}
    assert adapters.num_reads == {Path("a"): 1, Path("b"): 1}
    manager.check_integrity((), ())


def test_who_needs_no_load_passes_those_who_wait_for_the_loader_until_their_patience_ends() -> None:
    work = ManualWork()
    adapters = FakeAdapters()
    manager = make_manager(adapters, work, max_loras=3, binds_in_place=True, patience_s=1.0)
    for name in "abcd":
        manager.add(name, adapters.write(name))
    settle(manager, work)
    for name in "ab":
        manager.evict(name)
        request(manager, name)
    manager.evict("c")
    slow = request(manager, "c")
    quick = request(manager, "d")
    manager.add("e", adapters.write("e"))
    manager.advance()  # a and b are being loaded, which keeps their places; nothing is free to load c
    assert manager.admits(quick)
    manager.leave(quick)
    manager.deactivate("d").result(0)
    adapters.clock.advance(1.0)
    late = request(manager, "d")
    manager.advance()
    assert not manager.admits(late)
    settle(manager, work)
    assert manager.admits(slow)

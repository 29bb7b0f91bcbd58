from __future__ import annotations

import gc
import weakref
from concurrent.futures import Future
from itertools import count
from pathlib import Path

import pytest

from model_worker.engine.lora.lora_manager import LoraManager
from model_worker.engine.lora.lora_weight import LoraWeight
from model_worker.engine.lora.variant_status import VariantStatus
from model_worker.engine.sampling_params import SamplingParams
from model_worker.engine.sequence import Sequence
from registry.errors import (
    CheckpointError,
    InsufficientMemoryError,
    InternalError,
    InvalidRequestError,
    ModelNotFoundError,
    RootgraftError,
)
from tests.fakes.fake_adapters import FakeAdapters, FakeTerms, ManualWork, make_manager, settle

_NUMBERS = count()


def added(manager: LoraManager, adapters: FakeAdapters, *names: str, pinned: bool = False) -> None:
    for name in names:
        reply = manager.add(name, adapters.write(name), pinned=pinned)
        settle(manager)
        assert reply.result(0).name == name


def request(manager: LoraManager, *loras: str | LoraWeight, priority: int = 0) -> Sequence:
    """A sequence that waits."""
    weights = [LoraWeight(lora) if isinstance(lora, str) else lora for lora in loras]
    variant = manager.resolve(weights)
    sequence = Sequence(next(_NUMBERS), 0, [1], SamplingParams(priority=priority), seed=0, variant=variant)
    manager.wait(sequence)
    if variant is not None:
        manager.count_request(variant)
    return sequence


def run(manager: LoraManager, *loras: str | LoraWeight) -> Sequence:
    """A sequence that runs."""
    sequence = request(manager, *loras)
    settle(manager)
    assert manager.admits(sequence)
    manager.enter(sequence)
    return sequence


def states(manager: LoraManager) -> dict[str, str]:
    return {status.name: status.state for status in manager.statuses()}


def error_of(reply: Future[VariantStatus]) -> RootgraftError:
    error = reply.exception(0)
    assert isinstance(error, RootgraftError)
    return error


# ---------------------------------------------------------------------------------------------- adding


def test_an_adapter_is_read_when_added_and_bound_when_wanted() -> None:
    work = ManualWork()
    adapters = FakeAdapters(read_s=0.2, bind_s=0.01)
    manager = make_manager(adapters, work)
    reply = manager.add("a", adapters.write("a"), parent="base")
    assert states(manager) == {"a": "registered"}
    with pytest.raises(ModelNotFoundError):
        manager.resolve([LoraWeight("a")])
    settle(manager, work)
    status = reply.result(0)
    assert (status.digest, status.parent, status.rank, status.host_bytes) == ("sha256:a", "base", 8, 10)
    assert states(manager) == {"a": "in_host_memory"}
    sequence = request(manager, "a")
    assert not manager.admits(sequence)
    settle(manager, work)
    assert manager.admits(sequence)
    manager.enter(sequence)
    (status,) = manager.statuses()
    assert (status.state, status.num_running, status.num_waiting, status.active_bytes) == ("active", 1, 0, 10)
    assert (status.loads_total, status.activations_total, status.requests_total, status.hits_total) == (1, 1, 1, 0)
    assert status.load_s_total == pytest.approx(0.2)
    run(manager, "a")
    assert manager.statuses()[0].hits_total == 1


def test_the_base_needs_nobody() -> None:
    manager = make_manager(FakeAdapters())
    sequence = request(manager)
    assert sequence.variant is None
    assert manager.admits(sequence)
    assert not manager.holds_up(sequence)
    manager.enter(sequence)
    manager.leave(sequence)
    manager.check_idle()


@pytest.mark.parametrize("cause", [CheckpointError("wrong"), ValueError("a bug")])
def test_a_refused_adapter_leaves_nothing_behind(cause: Exception) -> None:
    adapters = FakeAdapters()
    manager = make_manager(adapters)
    adapters.refuse["read sha256:a"] = cause
    reply = manager.add("a", adapters.write("a"))
    settle(manager)
    assert isinstance(error_of(reply), CheckpointError if isinstance(cause, CheckpointError) else InternalError)
    assert manager.statuses() == []


def test_the_same_files_again_only_set_the_pin() -> None:
    adapters = FakeAdapters()
    manager = make_manager(adapters)
    added(manager, adapters, "a")
    variant = manager.resolve([LoraWeight("a")])
    added(manager, adapters, "a", pinned=True)
    assert manager.resolve([LoraWeight("a")]) is variant
    assert manager.statuses()[0].pinned
    added(manager, adapters, "a")
    assert not manager.statuses()[0].pinned


def test_other_files_under_the_same_name_replace_the_old_ones_which_drain() -> None:
    adapters = FakeAdapters()
    manager = make_manager(adapters)
    added(manager, adapters, "a")
    old = run(manager, "a")
    adapters.write("a", FakeTerms("sha256:new"))
    manager.add("a", Path("a"))
    settle(manager)
    new = run(manager, "a")
    assert [status.state for status in manager.statuses()] == ["draining", "active"]
    assert old.variant is not None
    assert new.variant is not None
    assert old.variant.bound is not None
    assert old.weights_digest != new.weights_digest
    manager.leave(old)
    assert old.variant.bound is None
    assert [status.digest for status in manager.statuses()] == ["sha256:new"]


def test_a_replacement_that_is_refused_changes_nothing() -> None:
    adapters = FakeAdapters()
    manager = make_manager(adapters)
    added(manager, adapters, "a")
    del adapters.files[Path("a")]
    reply = manager.add("a", Path("a"))
    settle(manager)
    assert isinstance(error_of(reply), CheckpointError)
    assert states(manager) == {"a": "in_host_memory"}


# ---------------------------------------------------------------------------------------------- removing


def test_removing_drains_and_then_frees() -> None:
    adapters = FakeAdapters()
    manager = make_manager(adapters)
    added(manager, adapters, "a")
    running, waiting = run(manager, "a"), request(manager, "a")
    assert manager.remove("a").result(0).state == "draining"
    with pytest.raises(ModelNotFoundError):
        manager.resolve([LoraWeight("a")])
    manager.leave(running)
    assert manager.admits(waiting)
    manager.enter(waiting)
    manager.leave(waiting)
    assert manager.statuses() == []
    assert running.variant is not None
    assert running.variant.bound is None
    manager.check_integrity((), ())
    assert isinstance(error_of(manager.remove("a")), ModelNotFoundError)


def test_nothing_keeps_what_is_removed_in_memory() -> None:
    adapters = FakeAdapters()
    manager = make_manager(adapters)
    added(manager, adapters, "a", "b")
    for loras in (["a"], [LoraWeight("a", 0.5), LoraWeight("b")]):
        sequence = run(manager, *loras)
        assert sequence.variant is not None
        bound = weakref.ref(sequence.variant.bound)
        manager.leave(sequence)
    manager.remove("a")
    gc.collect()
    assert bound() is None
    assert [status.name for status in manager.statuses()] == ["b"]
    manager.check_integrity((), ())


def test_a_load_under_way_for_a_removed_adapter_is_dropped() -> None:
    work = ManualWork()
    adapters = FakeAdapters()
    manager = make_manager(adapters, work)
    reply = manager.add("a", adapters.write("a"))
    manager.advance()
    manager.remove("a")
    assert isinstance(error_of(reply), InvalidRequestError)
    settle(manager, work)
    assert manager.statuses() == []
    manager.add("b", adapters.write("b"))
    settle(manager, work)
    sequence = request(manager, "b")
    manager.advance()
    manager.leave(sequence)
    manager.remove("b")
    settle(manager, work)
    assert manager.statuses() == []
    manager.check_integrity((), ())


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


# ---------------------------------------------------------------------------------------------- failures


def test_requests_for_what_cannot_be_loaded_any_more_end_with_the_reason() -> None:
    adapters = FakeAdapters()
    manager = make_manager(adapters)
    added(manager, adapters, "a")
    manager.evict("a")
    adapters.write("a", FakeTerms("sha256:changed"))
    waiting = request(manager, "a")
    (doomed,) = [one for _ in range(3) for one in manager.advance()]
    assert doomed[0] is waiting
    assert "have changed" in doomed[1].message
    manager.leave(waiting)
    assert states(manager) == {"a": "failed"}
    with pytest.raises(CheckpointError):
        manager.resolve([LoraWeight("a")])
    adapters.write("a")
    reply = manager.activate("a")
    settle(manager)
    assert reply.result(0).state == "active"


def test_a_failed_activation_says_so() -> None:
    adapters = FakeAdapters()
    manager = make_manager(adapters)
    added(manager, adapters, "a")
    adapters.refuse["bind sha256:a"] = MemoryError()
    reply = manager.activate("a")
    for _ in range(3):
        manager.advance()
    assert isinstance(error_of(reply), InternalError)
    assert states(manager) == {"a": "failed"}


def test_closing_fails_what_is_open() -> None:
    work = ManualWork()
    adapters = FakeAdapters()
    manager = make_manager(adapters, work)
    manager.add("a", adapters.write("a"))
    settle(manager, work)
    replies = [manager.activate("a"), manager.add("b", adapters.write("b"))]
    manager.close()
    assert work.closed
    assert all(isinstance(error_of(reply), InternalError) for reply in replies)


# ---------------------------------------------------------------------------------------------- combinations


def test_a_combination_is_a_variant_of_its_own_and_goes_with_its_last_use() -> None:
    adapters = FakeAdapters()
    manager = make_manager(adapters, max_loras=1)
    added(manager, adapters, "a", "b")
    both = (LoraWeight("a", 0.5), LoraWeight("b", 2.0))
    first, second = run(manager, *both), run(manager, *both)
    assert first.variant is second.variant
    assert first.variant is manager.resolve(both[::-1])
    assert first.variant is not None
    alone = manager.resolve([LoraWeight("a")])
    assert alone is not None
    assert manager.resolve([LoraWeight("a", 1.0)]) is alone
    assert len({first.variant.digest, alone.digest}) == 2
    assert set(states(manager)) == {"a", "b"}
    assert (manager.num_active, manager.num_combinations) == (1, 1)
    assert manager.combination_bytes > 0
    manager.leave(first)
    manager.leave(second)
    assert manager.resolve(both) is first.variant
    manager.remove("a")
    with pytest.raises(ModelNotFoundError):
        manager.resolve(both)
    assert first.variant.bound is None
    assert (manager.num_active, manager.num_combinations, manager.combination_bytes) == (0, 0, 0)
    manager.check_integrity((), ())


def test_combinations_whose_requests_are_refused_leave_nothing_behind() -> None:
    adapters = FakeAdapters()
    manager = make_manager(adapters)
    added(manager, adapters, "a")
    for number in range(100):
        manager.resolve([LoraWeight("a", 0.5 + number)])
    assert len(manager._directory.combinations) == 1
    assert len(manager._directory.entries) == 2


def test_combinations_are_refused_where_they_are_no_sums() -> None:
    adapters = FakeAdapters()
    manager = make_manager(adapters)
    added(manager, adapters, "a")
    manager.add("dora", adapters.write("dora", FakeTerms("sha256:dora", adds_only=False)))
    settle(manager)
    run(manager, "dora")
    for loras in ([LoraWeight("dora", 0.5)], [LoraWeight("a"), LoraWeight("dora")], [LoraWeight("a", float("nan"))]):
        with pytest.raises(InvalidRequestError):
            manager.resolve(loras)

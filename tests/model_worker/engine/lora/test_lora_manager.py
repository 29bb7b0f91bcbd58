from __future__ import annotations

import gc
import weakref
from pathlib import Path

import pytest

from model_worker.engine.lora.lora_weight import LoraWeight
from registry.errors import (
    CheckpointError,
    InternalError,
    InvalidRequestError,
    ModelNotFoundError,
)
from tests.fakes.fake_adapters import FakeAdapters, FakeTerms, ManualWork, make_manager, settle
from tests.fakes.lora_requests import added, error_of, request, run, states

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

from __future__ import annotations

import pytest

from model_worker.engine.lora.lora_weight import LoraWeight
from registry.errors import (
    InvalidRequestError,
    ModelNotFoundError,
)
from tests.fakes.fake_adapters import FakeAdapters, FakeTerms, make_manager, settle
from tests.fakes.lora_requests import added, run, states


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

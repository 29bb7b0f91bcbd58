"""Requests to a LoRA manager, without a scheduler."""

from __future__ import annotations

from concurrent.futures import Future
from itertools import count

from model_worker.engine.lora.lora_manager import LoraManager
from model_worker.engine.lora.lora_weight import LoraWeight
from model_worker.engine.lora.variant_status import VariantStatus
from model_worker.engine.sampling_params import SamplingParams
from model_worker.engine.sequence import Sequence
from registry.errors import RootgraftError
from tests.fakes.fake_adapters import FakeAdapters, settle

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

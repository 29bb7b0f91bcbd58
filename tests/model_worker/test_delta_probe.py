from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import pytest

from controller.protocol import AddVariantRequest
from delta.quality_record import Probe, ProbeCase
from model_worker import delta_probe
from model_worker.adapter_root import AdapterRoot
from model_worker.delta_probe import DeltaProbe
from model_worker.engine.lora.lora_weight import LoraWeight
from model_worker.engine.outputs import FinishReason, RequestOutput, SequenceDelta, TokenLogprobs, TopToken
from model_worker.variants import Variants
from registry.errors import OverloadedError, ProbeFailedError
from tests.fakes.byte_tokenizer import ByteTokenizer
from tests.fakes.fake_loras import FakeLoras
from tests.fakes.load_plans import make_plan
from tests.fakes.until import until

PROBE = Probe(
    (ProbeCase("one", (1, 2), (7, 8), (-0.5, -1.5)), ProbeCase("long", tuple(range(50)), (7,), (-9.0,))), tolerance=0.1
)


class FakeGenerate:
    """Attributes:
    logprob: of the token 7.
    gate: answers wait for it.
    """

    def __init__(self, logprob: float = -0.45) -> None:
        self.logprob = logprob
        self.gate = asyncio.Event()
        self.gate.set()
        self.asked: list[tuple[list[int], Any]] = []

    async def __call__(
        self, request_id: str, token_ids: list[int], sampling: Any, *, loras: Any
    ) -> AsyncGenerator[RequestOutput, None]:
        self.asked.append((token_ids, loras))
        assert (sampling.max_tokens, sampling.logprobs) == (1, 10)
        await self.gate.wait()
        logprobs = TokenLogprobs(7, self.logprob, (TopToken(7, self.logprob), TopToken(8, -1.5)))
        delta = SequenceDelta(0, "x", (7,), (logprobs,), finish_reason=FinishReason.LENGTH)
        yield RequestOutput(request_id, len(token_ids), 0, (delta,), finished=True)


@pytest.fixture
def generate(monkeypatch: pytest.MonkeyPatch) -> FakeGenerate:
    monkeypatch.setattr(delta_probe, "_read_probe", lambda directory: PROBE)
    return FakeGenerate()


def make_probe(generate: FakeGenerate) -> DeltaProbe:
    return DeltaProbe(generate, max_model_len=32, weights="float32")


async def test_a_variant_that_answers_as_it_should(generate: FakeGenerate, tmp_path: Path) -> None:
    passed = await make_probe(generate)("bot@v1", tmp_path)
    assert passed is not None
    assert passed.num_cases == 1
    assert 0.0 <= passed.max_difference <= passed.tolerance
    assert generate.asked == [([1, 2], (LoraWeight("bot@v1", 1.0),))]  # the other one is too long for this worker


async def test_one_that_does_not(generate: FakeGenerate, tmp_path: Path) -> None:
    generate.logprob = -0.7
    with pytest.raises(ProbeFailedError, match="fails 1 of the 1 cases of its probe"):
        await make_probe(generate)("bot@v1", tmp_path)


async def test_no_time(generate: FakeGenerate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delta_probe, "TIMEOUT_S", 0.01)
    generate.gate.clear()
    with pytest.raises(OverloadedError):
        await make_probe(generate)("bot@v1", tmp_path)


async def test_nobody_counts_on_a_variant_before_it_has_answered(generate: FakeGenerate, tmp_path: Path) -> None:
    (tmp_path / "bot").mkdir()
    engine = FakeLoras()
    variants = Variants(
        engine, make_plan(), ByteTokenizer(), parent="base", root=AdapterRoot(tmp_path), with_templates=True,
        probe=make_probe(generate),
    )  # fmt: skip
    generate.gate.clear()
    addition = AddVariantRequest(name="bot", parent="base", path="bot")
    adding = asyncio.create_task(variants.add(addition))
    await until(lambda: generate.asked)
    variants._used = True  # an earlier variant was there
    assert [(status.state, status.probe) for status in await variants.statuses()] == [("registered", None)]
    generate.gate.set()
    added = await adding
    assert (added.state, added.probe and added.probe.num_cases) == ("in_host_memory", 1)
    assert await variants.statuses() == [added]
    await variants.add(addition)
    assert len(generate.asked) == 1  # proven already


async def test_a_variant_that_fails_its_probe_is_gone(generate: FakeGenerate, tmp_path: Path) -> None:
    (tmp_path / "bot").mkdir()
    engine = FakeLoras()
    variants = Variants(
        engine, make_plan(), ByteTokenizer(), parent="base", root=AdapterRoot(tmp_path), with_templates=True,
        probe=make_probe(generate),
    )  # fmt: skip
    generate.logprob = -3.0
    with pytest.raises(ProbeFailedError):
        await variants.add(AddVariantRequest(name="bot", parent="base", path="bot"))
    assert await engine.list() == []
    assert await variants.statuses() == []

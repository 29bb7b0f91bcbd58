"""Adapters from the engine's outside: requests for them, and the calls that change them while requests run."""

from __future__ import annotations

import asyncio
import random
import threading
from contextlib import suppress
from pathlib import Path

import pytest

from model_worker.engine.async_llm_engine import AsyncLLMEngine
from model_worker.engine.config import CacheConfig, EngineConfig, SchedulerConfig
from model_worker.engine.llm_engine import LLMEngine
from model_worker.engine.lora.loader_thread import loader_thread
from model_worker.engine.lora.lora_manager import LoraManager
from model_worker.engine.lora.lora_weight import LoraWeight
from model_worker.engine.sampling_params import SamplingParams
from registry.errors import (
    CheckpointError,
    ClientError,
    InternalError,
    InvalidRequestError,
    ModelNotFoundError,
    UnsupportedModelError,
)
from tests.fakes.byte_tokenizer import ByteTokenizer
from tests.fakes.engine_news import collect, run, tokens_of
from tests.fakes.fake_adapters import FakeAdapters, FakeTerms, ManualWork, make_manager, settle
from tests.fakes.fake_executor import FakeExecutor, next_token

VOCAB = 128


def make_engine(loras: LoraManager | None, *, max_model_len: int = 64, num_blocks: int = 64) -> LLMEngine:
    config = EngineConfig(CacheConfig(), SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=16))
    executor = FakeExecutor(num_blocks, vocab_size=VOCAB)
    return LLMEngine(
        config, executor, ByteTokenizer(), stop_token_ids=(), max_model_len=max_model_len, loras=loras,
        variant_digest="sha256:base",
    )  # fmt: skip


def continuation(prompt: list[int], count: int, variant: str | None) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens, 0, VOCAB, variant=variant))
    return tokens[len(prompt) :]


def test_base_and_adapters_answer_side_by_side() -> None:
    adapters = FakeAdapters()
    loras = make_manager(adapters)
    for name in ("a", "b"):
        loras.add(name, adapters.write(name))
        settle(loras)
    engine = make_engine(loras)
    for name in ("base", "a", "b"):
        engine.add_request(
            name, [5] * 9, SamplingParams(max_tokens=6), loras=[] if name == "base" else [LoraWeight(name)]
        )
    news = run(engine)
    assert tokens_of(news["base"]) == continuation([5] * 9, 6, None)
    for name in ("a", "b"):
        assert tokens_of(news[name]) == continuation([5] * 9, 6, f"sha256:{name}")
    assert [status.generation_tokens_total for status in loras.statuses()] == [6, 6]
    with pytest.raises(ModelNotFoundError):
        engine.add_request("c", [5], SamplingParams(), loras=[LoraWeight("c")])


def test_repetitive_text_is_guessed_with_adapters_too() -> None:
    """Drafts are rows of the adapter, and right ones are kept."""

    class Constant(FakeExecutor):
        def token_after(self, visible: list[list[int | tuple[int, str]]], index: int) -> int:
            return 7 if visible[0][-1] == (7, "sha256:a") else 3

    adapters = FakeAdapters()
    loras = make_manager(adapters)
    loras.add("a", adapters.write("a"))
    settle(loras)
    config = EngineConfig(CacheConfig(), SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=16))
    engine = LLMEngine(
        config, Constant(vocab_size=VOCAB), ByteTokenizer(), stop_token_ids=(), max_model_len=100, loras=loras
    )
    engine.add_request("r", [7] * 8, SamplingParams(max_tokens=60), loras=[LoraWeight("a")])
    assert tokens_of(run(engine)["r"]) == [7] * 60
    assert engine.stats().accepted_draft_tokens_total > 0
    assert loras.statuses()[0].generation_tokens_total == 60


def test_requests_for_an_adapter_that_fails_end_with_its_error() -> None:
    adapters = FakeAdapters()
    loras = make_manager(adapters)
    loras.add("a", adapters.write("a"))
    settle(loras)
    adapters.refuse["bind sha256:a"] = UnsupportedModelError("no place for it")
    engine = make_engine(loras)
    engine.add_request("base", [1], SamplingParams(max_tokens=3))
    engine.add_request("a", [1], SamplingParams(max_tokens=3, n=2), loras=[LoraWeight("a")])
    news = run(engine)
    assert [output.finished for output in news["a"]] == [True]
    assert isinstance(news["a"][0].error, UnsupportedModelError)
    assert news["base"][-1].error is None
    assert engine.stats().failed_total == 1


def test_an_engine_without_adapters_says_so() -> None:
    engine = make_engine(None)
    with pytest.raises(UnsupportedModelError):
        engine.add_request("r", [1], SamplingParams(), loras=[LoraWeight("a")])


# ---------------------------------------------------------------------------------------------- the event loop


async def test_adapters_come_and_go_while_requests_run() -> None:
    adapters = FakeAdapters()
    engine = AsyncLLMEngine(make_engine(make_manager(adapters, loader_thread()), max_model_len=8000, num_blocks=4000))
    await engine.start()
    stream = engine.generate("long", [1], SamplingParams(max_tokens=7000))
    await anext(stream)
    status = await engine.loras.add("a", adapters.write("a"), parent="base", pinned=True)
    assert (status.state, status.parent, status.pinned) == ("in_host_memory", "base", True)
    assert (await engine.loras.activate("a")).state == "active"
    news = await collect(engine.generate("r", [5], SamplingParams(max_tokens=4), loras=[LoraWeight("a")]))
    assert tokens_of(news) == continuation([5], 4, "sha256:a")
    with pytest.raises(InvalidRequestError):
        await engine.loras.evict("a")
    assert not (await engine.loras.unpin("a")).pinned
    assert (await engine.loras.deactivate("a")).state == "in_host_memory"
    assert (await engine.loras.evict("a")).state == "on_disk"
    assert (await engine.loras.pin("a")).pinned
    await engine.loras.remove("a")
    assert await engine.loras.list() == []
    with pytest.raises(ModelNotFoundError):
        await collect(engine.generate("s", [5], SamplingParams(), loras=[LoraWeight("a")]))
    with pytest.raises(CheckpointError):
        await engine.loras.add("b", Path("nowhere"))
    await stream.aclose()
    await engine.stop()
    with pytest.raises(InternalError):
        await engine.loras.list()


async def test_an_idle_engine_loads_too() -> None:
    adapters = FakeAdapters()
    engine = AsyncLLMEngine(make_engine(make_manager(adapters, loader_thread())))
    await engine.start()
    for name in ("a", "b"):
        await engine.loras.add(name, adapters.write(name))
    assert (await engine.loras.activate("b")).state == "active"
    await engine.stop()


async def test_an_engine_in_which_all_wait_for_adapters_sleeps_and_wakes() -> None:
    adapters = FakeAdapters()
    may_read = threading.Event()
    read = adapters.read

    def slow_read(path: Path) -> FakeTerms:
        may_read.wait(60)
        return read(path)

    may_read.set()
    adapters.read = slow_read  # type: ignore[method-assign]
    engine = AsyncLLMEngine(make_engine(make_manager(adapters, loader_thread())))
    await engine.start()
    await engine.loras.add("a", adapters.write("a"))
    await engine.loras.evict("a")
    may_read.clear()
    waiting = asyncio.create_task(
        collect(engine.generate("r", [5], SamplingParams(max_tokens=2), loras=[LoraWeight("a")]))
    )
    base = await collect(engine.generate("s", [5], SamplingParams(max_tokens=2)))
    assert base[-1].finished
    assert not waiting.done()
    assert engine.num_steps < 50
    may_read.set()
    assert tokens_of(await waiting) == continuation([5], 2, "sha256:a")
    await engine.stop()


async def test_stopping_fails_calls_that_are_open() -> None:
    adapters = FakeAdapters()
    engine = AsyncLLMEngine(make_engine(make_manager(adapters, ManualWork())))
    await engine.start()
    call = asyncio.create_task(engine.loras.add("a", adapters.write("a")))
    await asyncio.sleep(0.01)
    await engine.stop()
    with pytest.raises(InternalError):
        await call


async def test_calls_to_an_engine_without_adapters_are_refused() -> None:
    engine = AsyncLLMEngine(make_engine(None))
    await engine.start()
    with pytest.raises(UnsupportedModelError):
        await engine.loras.add("a", Path("a"))
    await engine.stop()


async def test_after_any_mix_of_requests_and_changes_nothing_is_held() -> None:
    """Requests, cancellations, loads, removals and pins at once; places, memory and blocks are free in the end."""
    chance = random.Random(5)
    adapters = FakeAdapters()
    manager = make_manager(adapters, loader_thread(), max_loras=3, max_cpu_loras=5, memory_bytes=150, patience_s=0.0)
    inner = make_engine(manager)
    engine = AsyncLLMEngine(inner)
    await engine.start()
    names = [f"v{i}" for i in range(20)]
    for name in names:
        await engine.loras.add(name, adapters.write(name))
    finished: list[str] = []

    async def ask(number: int) -> None:
        name = chance.choice([*names, *names[:2] * 5])
        loras = chance.choice([[], [LoraWeight(name)], [LoraWeight(name, 0.5), LoraWeight(chance.choice(names))]])
        cancel_after = chance.choice([None, None, 0, 2])
        stream = engine.generate(f"r{number}", [number % 7] * 5, SamplingParams(max_tokens=6), loras=loras)
        try:
            async for output in stream:
                if output.error is not None:
                    raise output.error
                if cancel_after is not None and len(output.deltas) > cancel_after:
                    break
            finished.append(name)
        except ClientError:  # it was removed or overwritten just now, or pins leave no place
            pass
        finally:
            await stream.aclose()

    async def change() -> None:
        name = chance.choice(names)
        calls = [engine.loras.pin, engine.loras.unpin, engine.loras.unpin, engine.loras.evict, engine.loras.activate]
        with suppress(ClientError):
            if chance.random() < 0.3:
                await engine.loras.remove(name)
                await engine.loras.add(name, adapters.write(name, FakeTerms(f"sha256:{chance.random()}")))
            else:
                await chance.choice(calls)(name)

    async with asyncio.timeout(60):
        for number in range(0, 400, 20):
            await asyncio.gather(*(ask(number + i) for i in range(20)), *(change() for _ in range(5)))
    assert len(finished) > 200
    for name in names:
        await engine.loras.remove(name)
    assert await engine.loras.list() == []
    await engine.stop()
    assert engine.failed is None
    inner.check_integrity()
    assert manager._tiers.num_bytes == 0
    assert engine.stats().kv_blocks_used == 0

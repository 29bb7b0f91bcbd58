"""The real controller and the real worker on loopback sockets; only the engine is a fake."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from model_worker import worker as worker_module
from model_worker.app import create_app
from model_worker.config import parse_config
from model_worker.worker import Worker, bind
from registry.errors import RateLimitError
from tests.controller.conftest import RunningController, StartController
from tests.fakes.byte_tokenizer import ByteTokenizer
from tests.fakes.fake_engine import FakeEngine
from tests.fakes.load_plans import make_plan
from tests.fakes.until import until

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}


@asynccontextmanager
async def running_worker(engine: FakeEngine, controller: RunningController, *flags: str) -> AsyncIterator[None]:
    argv = ["--model-path", "m", "--port", "0", "--controller", controller.url, *flags]
    config = parse_config(argv, worker_token=None)
    with bind(config.host, config.port) as sock:
        worker = Worker(engine, make_plan(), config, sock, model_name="m", engine_died=asyncio.Event())
        serving = asyncio.create_task(worker.run())
        try:
            await until(lambda: controller.state.workers.num_ready == 1)
            yield
        finally:
            worker._stop.set()
            await serving


@pytest.mark.parametrize("stream", [False, True])
async def test_the_workers_retry_after_reaches_the_client(start_controller: StartController, stream: bool) -> None:
    controller = await start_controller()
    engine = FakeEngine(ByteTokenizer())
    engine.refuse_with = RateLimitError("The queue is full.", retry_after_s=6.3)
    async with running_worker(engine, controller):
        response = await controller.post("/v1/chat/completions", json={**CHAT, "stream": stream})
        assert (response.status, response.headers["retry-after"]) == (429, "7")
        assert (await response.json())["error"]["code"] == "rate_limit_exceeded"


async def test_a_request_that_waits_longer_than_the_worker_timeout_is_served(
    start_controller: StartController, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_module, "create_app", functools.partial(create_app, keep_alive_s=0.05))
    controller = await start_controller(worker_timeout_s=0.5)
    engine = FakeEngine(ByteTokenizer())
    engine.gate.clear()
    async with running_worker(engine, controller):
        request = asyncio.create_task(controller.post("/v1/chat/completions", json=CHAT))
        await until(lambda: engine.running)
        for _ in range(10):  # other requests are computed
            await asyncio.sleep(0.1)
            engine.num_steps += 1
        assert not request.done()
        engine.gate.set()
        response = await request
        assert (response.status, (await response.json())["usage"]["completion_tokens"]) == (200, 3)
        assert len(engine.requests) == 1


async def test_a_request_of_an_engine_that_hangs_is_given_up(
    start_controller: StartController, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_module, "create_app", functools.partial(create_app, keep_alive_s=0.05))
    controller = await start_controller(worker_timeout_s=0.3)
    engine = FakeEngine(ByteTokenizer())
    engine.gate.clear()
    async with running_worker(engine, controller):
        response = await controller.post("/v1/chat/completions", json=CHAT)
        assert response.status == 502
        await until(lambda: engine.aborted)


async def test_adapters_are_loaded_asked_for_and_come_back_after_a_restart(
    start_controller: StartController, tmp_path: Path
) -> None:
    for name in ("sql", "chat", "given"):
        (tmp_path / name).mkdir()
    flags = ["--adapter-root", str(tmp_path), "--lora", f"given={tmp_path / 'given'}"]
    controller = await start_controller(heartbeat_interval_s=0.1, missed_heartbeats=50)
    engine = FakeEngine(ByteTokenizer())
    async with running_worker(engine, controller, *flags):
        body = {"lora_name": "team/sql", "lora_path": "sql"}
        assert (await controller.post("/v1/load_lora_adapter", json=body)).status == 200
        body = {"name": "chat", "path": "chat", "pinned": True}
        assert (await controller.post("/admin/variants", json=body)).status == 200
        response = await controller.post("/v1/load_lora_adapter", json={"lora_name": "x", "lora_path": "../.."})
        assert response.status == 403
        listed = (await (await controller.get("/v1/models")).json())["data"]
        assert [(model["id"], model["parent"]) for model in listed] == [
            ("m", None), ("chat", "m"), ("given", "m"), ("team/sql", "m"),
        ]  # fmt: skip
        loras = {"model": "m", "loras": [{"name": "chat", "scale": 0.5}, {"name": "given"}]}
        for asked in ({"model": "team/sql"}, {"model": "given"}, loras):
            response = await controller.post("/v1/chat/completions", json={**CHAT, **asked})
            assert response.status == 200, await response.text()
        assert engine.requested_loras == [(("team/sql", 1.0),), (("given", 1.0),), (("chat", 0.5), ("given", 1.0))]
    await until(lambda: controller.state.workers.num_ready == 0)
    again = FakeEngine(ByteTokenizer())
    async with running_worker(again, controller, *flags):
        await until(lambda: again.loras.added == ["given", "chat", "team/sql"])
        await until(lambda: controller.state.directory.on_workers("team/sql")[0].usable)
        (chat,) = [status for status in await again.loras.list() if status.name == "chat"]
        assert chat.pinned
        response = await controller.post("/v1/chat/completions", json={**CHAT, "model": "team/sql"})
        assert response.status == 200


async def test_an_adapter_is_loaded_used_and_tokenized_for_with_its_own_template(
    start_controller: StartController, tmp_path: Path
) -> None:
    (tmp_path / "pirate").mkdir()
    (tmp_path / "pirate/chat_template.jinja").write_text("{% for message in messages %}Arr, hi{% endfor %}")
    controller = await start_controller()
    engine = FakeEngine(ByteTokenizer())
    async with running_worker(engine, controller, "--adapter-root", str(tmp_path)):
        load = {"lora_name": "arr", "lora_path": "pirate"}
        assert (await controller.post("/v1/load_lora_adapter", json=load)).status == 200
        response = await controller.post("/v1/chat/completions", json={**CHAT, "model": "arr"})
        assert (await response.json())["usage"]["prompt_tokens"] == len("Arr, hi")
        assert engine.requested_loras == [(("arr", 1.0),)]
        for model, text in (("arr", b"Arr, hi"), ("m", b"user: hi\nassistant: ")):
            response = await controller.post("/tokenize", json={"model": model, "messages": CHAT["messages"]})
            assert bytes((await response.json())["tokens"]) == text

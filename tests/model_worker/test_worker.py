from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest

from controller.protocol import GENERATE_EVENT
from model_worker import worker as worker_module
from model_worker.config import WorkerConfig, parse_config
from model_worker.worker import Worker, bind, reachable_url
from registry.errors import CheckpointError, InvalidRequestError, PermissionDeniedError
from tests.fakes.byte_tokenizer import ByteTokenizer
from tests.fakes.fake_controller import FakeController
from tests.fakes.fake_engine import FakeEngine
from tests.fakes.load_plans import make_plan
from tests.fakes.until import until


@pytest.fixture
async def controller() -> AsyncIterator[FakeController]:
    async with FakeController(worker_token="secret", heartbeat_interval_s=0.05) as controller:
        yield controller


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine(ByteTokenizer())


def make_config(controller: str | None, *flags: str, worker_token: str | None = "secret") -> WorkerConfig:
    where = ["--controller", controller] if controller else ["--no-controller"]
    argv = ["--model-path", "m", "--port", "0", *where, *flags]
    return parse_config(argv, worker_token=worker_token)


class Running:
    """A worker that serves, with a client session of its own."""

    def __init__(self, engine: FakeEngine, config: WorkerConfig) -> None:
        self.engine = engine
        sock = bind(config.host, config.port)
        self.url = reachable_url(config, sock)
        died = asyncio.Event()
        self.worker = Worker(engine, make_plan(), config, sock, model_name="fake", engine_died=died)
        self._died = died
        self._headers = {"x-rootgraft-worker-token": "secret"}

    async def __aenter__(self) -> Running:
        self.session = aiohttp.ClientSession(headers=self._headers)
        self.task = asyncio.create_task(self.worker.run())
        async with self.session.get(self.url + "/health") as response:  # the socket listens already
            assert response.status == 200
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.session.close()
        if not self.task.done():
            self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)

    async def generate(self, text: str) -> tuple[int, list[str]]:
        payload = {"request_id": "r", "model": "fake", "prompt": {"kind": "text", "text": text}, "sampling": {}}
        async with self.session.post(self.url + "/internal/generate", json=payload) as response:
            lines = (await response.read()).splitlines()
            kinds = [GENERATE_EVENT.validate_json(line).kind for line in lines] if response.status == 200 else []
            return response.status, kinds

    def engine_dies(self) -> None:
        self.engine.die(RuntimeError("bug"))
        self._died.set()


async def test_serves_and_registers(engine: FakeEngine, controller: FakeController) -> None:
    async with Running(engine, make_config(controller.url)) as running:
        await until(lambda: controller.stats)
        (registration,) = controller.workers.values()
        assert registration.url == running.url
        assert [model.name for model in registration.models] == ["fake"]
        assert await running.generate("ab") == (200, ["prompt", "delta", "delta", "done"])


async def test_adapters_of_the_command_line_are_there_before_the_worker_registers(
    engine: FakeEngine, controller: FakeController, tmp_path: Path
) -> None:
    config = make_config(controller.url, "--lora", f"poet={tmp_path}", "--lora", f"pirate={tmp_path},pin")
    engine.loras.gate.clear()
    running = Running(engine, config)
    lines: list[str] = []
    task = asyncio.create_task(running.worker.run(lines.append))
    try:
        await asyncio.sleep(0.05)
        assert controller.calls == []
        engine.loras.gate.set()
        await until(lambda: controller.variants)
        (registration,) = controller.workers.values()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    assert registration.variants.variants == list(controller.variants.values())
    assert [(v.name, v.parent, v.state, v.from_command_line) for v in registration.variants.variants] == [
        ("poet", "fake", "in_host_memory", True),
        ("pirate", "fake", "active", True),
    ]
    assert [line.split(":")[0] for line in lines] == ["Adapter poet", "Adapter pirate"]


async def test_a_bad_adapter_of_the_command_line_stops_the_start(
    engine: FakeEngine, controller: FakeController, tmp_path: Path
) -> None:
    engine.loras.refuse_with = CheckpointError("It holds NaN.")
    running = Running(engine, make_config(controller.url, "--lora", f"pirate={tmp_path}"))
    with pytest.raises(CheckpointError, match=r"--lora pirate=.*: It holds NaN\."):
        await running.worker.run()
    assert controller.calls == []
    assert not engine.started


async def test_sigterm_drains_then_leaves_and_exits_with_0(engine: FakeEngine, controller: FakeController) -> None:
    async with Running(engine, make_config(controller.url)) as running:
        await until(lambda: controller.stats)
        engine.gate.clear()
        request = asyncio.create_task(running.generate("ab"))
        await until(lambda: engine.running)
        os.kill(os.getpid(), signal.SIGTERM)
        await until(lambda: controller.stats[-1].draining)
        assert (await running.generate("x"))[0] == 503
        assert not running.task.done()
        assert controller.workers
        engine.gate.set()
        assert await request == (200, ["prompt", "delta", "delta", "done"])
        assert await running.task == 0
    assert controller.calls[-1] == "leave"
    assert not engine.started


async def test_what_still_runs_after_the_drain_timeout_ends_in_an_error(engine: FakeEngine) -> None:
    engine.reply = lambda prompt: [97] * 200
    async with Running(engine, make_config(None, "--drain-timeout", "0.05")) as running:
        request = asyncio.create_task(running.generate("ab"))
        await until(lambda: engine.running)
        engine.gate.clear()
        os.kill(os.getpid(), signal.SIGINT)
        status, kinds = await request
        assert (status, kinds[-1:]) in ((200, ["error"]), (503, []))
        assert await running.task == 0
    assert len(engine.aborted) == 1


async def test_a_second_signal_exits_at_once(engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    exits: list[int] = []
    monkeypatch.setattr(worker_module.os, "_exit", exits.append)
    async with Running(engine, make_config(None)) as running:
        engine.gate.clear()
        request = asyncio.create_task(running.generate("ab"))
        await until(lambda: engine.running)
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.sleep(0.01)
        assert not exits
        os.kill(os.getpid(), signal.SIGTERM)
        await until(lambda: exits)
        assert exits == [128 + signal.SIGTERM]
        engine.gate.set()
        await request
        await running.task


async def test_a_dead_engine_ends_streams_leaves_and_exits_with_1(
    engine: FakeEngine, controller: FakeController
) -> None:
    async with Running(engine, make_config(controller.url)) as running:
        await until(lambda: controller.stats)
        engine.gate.clear()
        request = asyncio.create_task(running.generate("ab"))
        await until(lambda: engine.running)
        running.engine_dies()
        assert (await request)[0] == 500
        assert await running.task == 1
    assert controller.workers == {}


async def test_a_refusal_by_the_controller_ends_the_worker(engine: FakeEngine, controller: FakeController) -> None:
    config = make_config(controller.url, worker_token="wrong")
    running = Running(engine, config)
    with pytest.raises(PermissionDeniedError, match="token is wrong"):
        await running.worker.run()
    assert not engine.started


def test_the_next_free_port_is_taken_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    with bind("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setattr(worker_module, "DEFAULT_PORT", port)
        with bind("127.0.0.1", None) as found:
            assert found.getsockname()[1] > port


def test_a_taken_port_that_was_asked_for_is_an_error() -> None:
    with bind("127.0.0.1", 0) as taken, pytest.raises(InvalidRequestError, match="--port"):
        bind("127.0.0.1", taken.getsockname()[1])


def test_an_address_of_another_machine_is_an_error() -> None:
    with pytest.raises(InvalidRequestError, match="--host"):
        bind("192.0.2.1", 0)


def test_reachable_url() -> None:
    with bind("127.0.0.1", 0) as sock:
        assert reachable_url(make_config(None), sock) == f"http://127.0.0.1:{sock.getsockname()[1]}"
        advertised = make_config("http://127.0.0.1:9", "--advertise-url", "https://me:1/")
        assert reachable_url(advertised, sock) == "https://me:1"
    with bind("0.0.0.0", 0) as sock:
        port = sock.getsockname()[1]
        assert reachable_url(make_config("http://127.0.0.1:9"), sock) == f"http://127.0.0.1:{port}"
        assert reachable_url(make_config(None), sock) == f"http://{socket.gethostname()}:{port}"

from __future__ import annotations

import asyncio
import socket
from contextlib import ExitStack

import pytest
from fastapi import FastAPI, Request
from hypothesis import given, strategies as st

from controller import limits as limits_module
from controller.config import LimitsConfig
from controller.limits import ConcurrencyLimits
from registry.catalog import Catalog
from registry.errors import RateLimitError
from tests.controller.conftest import StartController
from tests.fakes.fake_clock import FakeClock
from tests.fakes.fake_worker import FakeWorker, Script
from tests.fakes.until import until

COMPLETION = {"model": "m", "prompt": "x"}


@given(st.lists(st.tuples(st.booleans(), st.sampled_from(["a", "b", None])), max_size=60))
def test_limits_hold_and_counts_are_exact(steps: list[tuple[bool, str | None]]) -> None:
    limits = ConcurrencyLimits(LimitsConfig(max_concurrent_requests=4, max_concurrent_requests_per_key=2))
    held = []
    for begin, key in steps:
        if begin:
            slot = limits.acquire(key)
            of_key = sum(other == key for other, _ in held)
            if len(held) >= 4 or (key is not None and of_key >= 2):
                with pytest.raises(RateLimitError):
                    slot.__enter__()
            else:
                slot.__enter__()
                held.append((key, slot))
        elif held:
            held.pop(0)[1].__exit__(None, None, None)
    for _, slot in held:
        slot.__exit__(None, None, None)
    assert not limits._of_key
    with ExitStack() as stack:
        for _ in range(4):
            stack.enter_context(limits.acquire(None))


def test_the_retry_time_is_measured() -> None:
    clock = FakeClock()
    limits = ConcurrencyLimits(LimitsConfig(max_concurrent_requests=4, max_concurrent_requests_per_key=2), clock)

    def retry_after_s(key: str | None) -> float | None:
        with pytest.raises(RateLimitError) as caught, limits.acquire(key):
            pass
        return caught.value.retry_after_s

    with limits.acquire("a"), limits.acquire("a"):
        assert retry_after_s("a") is None  # none has ended yet
        clock.advance(12.0)
    with limits.acquire("a"), limits.acquire("a"):
        assert [retry_after_s("a"), retry_after_s("a")] == [6.0, 12.0]
        with limits.acquire("b"), limits.acquire("b"):
            assert retry_after_s("c") == retry_after_s(None) / 2 == 3.0


def add_echo(app: FastAPI) -> None:
    @app.post("/v1/echo")
    async def echo(request: Request) -> int:
        return len(await request.body())


async def chunks(num: int, size: int):
    for _ in range(num):
        yield b"x" * size


@pytest.mark.parametrize(("num_chunks", "status"), [(0, 200), (1, 200), (10, 200), (11, 413), (1000, 413)])
@pytest.mark.parametrize("chunked", [True, False])
async def test_bodies_have_a_limit(
    start_controller: StartController, num_chunks: int, status: int, chunked: bool
) -> None:
    controller = await start_controller(max_body_bytes=10_000, edit=add_echo)
    data = chunks(num_chunks, 1000) if chunked else b"x" * num_chunks * 1000
    response = await controller.post("/v1/echo", data=data)
    assert response.status == status
    if status == 200:
        assert await response.json() == num_chunks * 1000
    else:
        error = (await response.json())["error"]
        assert error["code"] == "request_too_large"
        assert "10000" in error["message"]
    assert (await controller.get("/health")).status == 200


@pytest.mark.parametrize("framing", ["content-length: 20000000", "transfer-encoding: chunked"])
async def test_a_client_that_sends_all_before_it_reads_learns_why_it_is_refused(
    start_controller: StartController, framing: str
) -> None:
    controller = await start_controller(max_body_bytes=10_000)
    body = b"x" * 20_000_000
    if "chunked" in framing:
        body = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
    request = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\n{framing}\r\n\r\n".encode() + body

    def send_and_read() -> bytes:
        with socket.create_connection(("127.0.0.1", controller.port)) as client:
            client.sendall(request)
            return client.recv(100)

    assert (await asyncio.to_thread(send_and_read)).startswith(b"HTTP/1.1 413")


async def test_a_body_that_is_announced_and_does_not_come_is_refused_and_takes_no_place(
    start_controller: StartController, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits_module, "_MAX_DROPPING_S", 0.2)
    controller = await start_controller(max_body_bytes=10_000, max_concurrent_requests=1, edit=add_echo)
    reader, writer = await asyncio.open_connection("127.0.0.1", controller.port)
    writer.write(b"POST /v1/echo HTTP/1.1\r\nhost: x\r\ncontent-length: 900000000\r\n\r\n")
    assert (await controller.post("/v1/echo", data=b"x")).status == 200
    assert (await reader.readline()).startswith(b"HTTP/1.1 413")
    writer.close()


async def test_a_body_that_waits_for_a_word_is_not_asked_for_where_it_is_too_large(
    start_controller: StartController,
) -> None:
    controller = await start_controller(max_body_bytes=10_000)
    reader, writer = await asyncio.open_connection("127.0.0.1", controller.port)
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 900000000\r\nexpect: 100-continue\r\n\r\n"
    writer.write(head)
    assert (await reader.readline()).startswith(b"HTTP/1.1 413")
    writer.close()


async def test_workers_bodies_have_the_limit_too(start_controller: StartController) -> None:
    controller = await start_controller(max_body_bytes=10)
    async with FakeWorker() as worker:
        assert (await worker.register(controller.url)).status == 413


async def test_requests_at_once_are_limited_in_total(start_controller: StartController) -> None:
    controller = await start_controller(max_concurrent_requests=2)
    async with FakeWorker(script=Script(hang_after=0)) as worker:
        await worker.register(controller.url)
        open_requests = [asyncio.create_task(controller.post("/v1/completions", json=COMPLETION)) for _ in range(2)]
        await until(lambda: len(worker.requests) == 2)
        response = await controller.post("/v1/completions", json=COMPLETION)
        assert (response.status, response.headers["retry-after"]) == (429, "1")
        assert (await response.json())["error"]["code"] == "rate_limit_exceeded"
        assert (await controller.get("/v1/models")).status == 200  # reading lists is no work
        assert (await worker.heartbeat(controller.url)).status == 200
        for task in open_requests:
            task.cancel()
        worker.script = Script()
        status = 429
        while status == 429:  # until the controller has seen that the clients are gone
            status = (await controller.post("/v1/completions", json=COMPLETION)).status
        assert status == 200


async def test_requests_at_once_are_limited_for_each_key(start_controller: StartController, catalog: Catalog) -> None:
    controller = await start_controller(auth="required", max_concurrent_requests_per_key=1)
    ann, bob = (
        {"authorization": "Bearer " + catalog.create_api_key(name, role="user", actor="cli:me")[1]}
        for name in ("ann", "bob")
    )
    async with FakeWorker(script=Script(hang_after=0)) as worker:
        await worker.register(controller.url)
        first = asyncio.create_task(controller.post("/v1/completions", json=COMPLETION, headers=ann))
        await until(lambda: len(worker.requests) == 1)
        worker.script = Script()
        assert (await controller.post("/v1/completions", json=COMPLETION, headers=ann)).status == 429
        assert (await controller.post("/v1/completions", json=COMPLETION, headers=bob)).status == 200
        first.cancel()

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette

from controller.protocol import (
    GENERATE_EVENT,
    WORKER_TOKEN_HEADER,
    DeltaEvent,
    ErrorEvent,
    TokenizeReply,
    VariantsReply,
    VariantStatus,
    WorkerStats,
)
from model_worker.app import create_app
from model_worker.events import Event
from model_worker.service import WorkerService
from registry.errors import CheckpointError, InternalError, OverloadedError, RateLimitError
from tests.fakes.byte_tokenizer import ByteTokenizer
from tests.fakes.fake_engine import FakeEngine
from tests.fakes.load_plans import make_plan
from tests.fakes.until import until


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine(ByteTokenizer())


@pytest.fixture
def service(engine: FakeEngine) -> WorkerService:
    return WorkerService(engine, make_plan(), "fake")


@pytest.fixture
def app(service: WorkerService) -> Starlette:
    return create_app(service)


@pytest.fixture
async def client(app: Starlette) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://worker") as client:
        yield client


def body(text: str = "abc", **sampling: object) -> dict[str, Any]:
    return {"request_id": "r", "model": "fake", "prompt": {"kind": "text", "text": text}, "sampling": sampling}


def events_of(content: bytes) -> list[Event]:
    return [GENERATE_EVENT.validate_json(line) for line in content.splitlines()]


def kinds(content: bytes) -> list[str]:
    return [event.kind for event in events_of(content)]


class Connection:
    """One HTTP exchange driven by hand, so that the caller can go away whenever it likes."""

    def __init__(self, app: Starlette, payload: dict[str, Any]) -> None:
        self.sent: list[dict[str, Any]] = []
        self.news = asyncio.Event()
        self.stuck = False  # the caller does not read
        self._incoming: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._incoming.put_nowait({"type": "http.request", "body": json.dumps(payload).encode(), "more_body": False})
        scope = {
            "type": "http",
            "method": "POST",
            "path": "/internal/generate",
            "raw_path": b"/internal/generate",
            "query_string": b"",
            "headers": [],
        }
        self.task = asyncio.create_task(app(scope, self._incoming.get, self._send))  # type: ignore[arg-type]

    async def _send(self, message: Any) -> None:
        self.sent.append(message)
        self.news.set()
        if self.stuck:
            await asyncio.Event().wait()

    def close(self) -> None:
        self._incoming.put_nowait({"type": "http.disconnect"})

    @property
    def status(self) -> int:
        return int(self.sent[0]["status"])

    @property
    def content(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent)


async def test_generate_streams_ndjson(client: httpx.AsyncClient) -> None:
    response = await client.post("/internal/generate", json=body())
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/x-ndjson"
    assert kinds(response.content) == ["prompt", "delta", "delta", "delta", "done"]


async def test_one_write_for_each_engine_step(app: Starlette) -> None:
    connection = Connection(app, body("ab", n=2))
    await connection.task
    writes = [message["body"] for message in connection.sent if message["type"] == "http.response.body"]
    assert [kinds(write) for write in writes] == [["prompt", "delta", "delta"], ["delta", "delta", "done"], []]
    assert connection.sent[-1]["more_body"] is False


async def test_text_is_written_as_utf8(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.tokenizer.decode = lambda ids, **options: '日本\n\u2028"\\'  # type: ignore[method-assign]
    events = events_of((await client.post("/internal/generate", json=body("a"))).content.replace(b"\r", b""))
    assert isinstance(events[1], DeltaEvent)
    assert events[1].text == '日本\n\u2028"\\'


@pytest.mark.parametrize(
    ("content", "param"),
    [
        (b"", None),
        (b"{", None),
        (b"[]", None),
        (b'{"request_id": "r"}', "model"),
        (json.dumps(body() | {"extra": 1}).encode(), "extra"),
        (json.dumps(body(temperature=float("nan"))).encode(), "sampling.temperature"),
        (json.dumps(body() | {"prompt": {"kind": "image"}}).encode(), "prompt"),
    ],
)
async def test_malformed_requests_are_400(client: httpx.AsyncClient, content: bytes, param: str | None) -> None:
    response = await client.post("/internal/generate", content=content)
    assert response.status_code == 400
    event = ErrorEvent.model_validate_json(response.content)
    assert (event.code, event.param) == ("invalid_request", param)


async def test_a_refused_request_has_its_own_status(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.refuse_with = RateLimitError("Too many.", retry_after_s=1.5)
    response = await client.post("/internal/generate", json=body())
    assert response.status_code == 429
    assert response.headers["retry-after"] == "2"
    assert ErrorEvent.model_validate_json(response.content).code == "rate_limit_exceeded"


async def test_unknown_model_and_unknown_path_are_404(client: httpx.AsyncClient) -> None:
    response = await client.post("/internal/generate", json=body() | {"model": "other"})
    assert response.status_code == 404
    assert ErrorEvent.model_validate_json(response.content).code == "model_not_found"
    response = await client.post("/internal/nothing")
    assert response.status_code == 404
    assert ErrorEvent.model_validate_json(response.content)
    response = await client.get("/internal/generate")
    assert response.status_code == 405
    assert ErrorEvent.model_validate_json(response.content)


async def test_a_body_over_the_limit_is_413(service: WorkerService) -> None:
    transport = httpx.ASGITransport(create_app(service, max_body_bytes=1000))
    async with httpx.AsyncClient(transport=transport, base_url="http://worker") as client:
        response = await client.post("/internal/generate", json=body("x" * 1000))
    assert response.status_code == 413


async def test_errors_before_and_after_the_first_token(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.fail_after = (0, InternalError("broken"))
    response = await client.post("/internal/generate", json=body())
    assert response.status_code == 500
    engine.fail_after = (1, InternalError("broken"))
    response = await client.post("/internal/generate", json=body())
    assert response.status_code == 200
    assert kinds(response.content) == ["prompt", "delta", "error"]


async def test_a_bug_ends_the_stream_with_an_error_event(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    decode = engine.tokenizer.decode

    def broken(ids: Any, **options: Any) -> str:
        if ids == [ord("b")]:
            raise ZeroDivisionError
        return decode(ids, **options)

    engine.tokenizer.decode = broken  # type: ignore[method-assign]
    response = await client.post("/internal/generate", json=body("abc"))
    assert kinds(response.content) == ["prompt", "delta", "error"]
    response = await client.post("/internal/generate", json=body("bc"))
    assert response.status_code == 500
    assert ErrorEvent.model_validate_json(response.content).code == "internal_error"


async def test_a_caller_that_goes_away_before_the_first_token_aborts(app: Starlette, engine: FakeEngine) -> None:
    engine.gate.clear()
    connection = Connection(app, body())
    await until(lambda: engine.running)
    connection.close()
    await connection.task
    assert not engine.running
    assert len(engine.aborted) == 1
    assert connection.sent == []


async def test_a_caller_that_goes_away_later_aborts(app: Starlette, engine: FakeEngine, service: WorkerService) -> None:
    connection = Connection(app, body("x" * 100))
    await connection.news.wait()
    engine.gate.clear()
    connection.close()
    await connection.task
    assert not engine.running
    assert len(engine.aborted) == 1
    assert service.drain.num_running == 0


async def test_a_caller_that_stops_reading_and_goes_away_aborts(app: Starlette, engine: FakeEngine) -> None:
    connection = Connection(app, body("x" * 100))
    connection.stuck = True
    await connection.news.wait()
    connection.close()
    await connection.task
    assert not engine.running


async def test_a_request_that_waits_gets_blank_lines_as_long_as_the_engine_computes(
    service: WorkerService, engine: FakeEngine
) -> None:
    engine.gate.clear()
    connection = Connection(create_app(service, keep_alive_s=0.001), body("ab"))
    await until(lambda: engine.running)
    await asyncio.sleep(0.02)
    assert connection.sent == []  # an engine that computes nothing may hang
    engine.num_steps += 1
    await until(lambda: connection.content == b"\n")
    assert connection.status == 200
    engine.gate.set()
    await connection.task
    assert kinds(connection.content.lstrip(b"\n")) == ["prompt", "delta", "delta", "done"]


async def test_an_error_after_a_blank_line_is_an_event(service: WorkerService, engine: FakeEngine) -> None:
    engine.gate.clear()
    engine.fail_after = (0, InternalError("broken"))
    connection = Connection(create_app(service, keep_alive_s=0.001), body())
    await until(lambda: engine.running)
    await asyncio.sleep(0)
    engine.num_steps += 1
    await until(lambda: connection.content != b"")
    engine.gate.set()
    await connection.task
    assert kinds(connection.content.lstrip(b"\n")) == ["error"]


async def test_a_draining_worker_refuses_and_finishes(
    app: Starlette, client: httpx.AsyncClient, service: WorkerService, engine: FakeEngine
) -> None:
    engine.gate.clear()
    connection = Connection(app, body())
    await until(lambda: engine.running)
    assert (await client.get("/health")).status_code == 200
    service.drain.begin()
    assert not await service.drain.wait_idle(0.01)
    refused = await client.post("/internal/generate", json=body())
    assert refused.status_code == 503
    assert "retry-after" not in refused.headers  # nobody knows when there will be another worker
    assert ErrorEvent.model_validate_json(refused.content).code == "overloaded"
    assert (await client.get("/health")).status_code == 503
    assert (await client.head("/health")).status_code == 503  # as load balancers ask
    assert WorkerStats.model_validate_json((await client.get("/internal/stats")).content).draining
    engine.gate.set()
    assert await service.drain.wait_idle(10)
    await connection.task
    assert kinds(connection.content)[-1] == "done"


async def test_cancelled_requests_end_in_an_error_event_or_status(
    app: Starlette, service: WorkerService, engine: FakeEngine
) -> None:
    streaming = Connection(app, body("x" * 100))
    await streaming.news.wait()
    engine.gate.clear()
    waiting = Connection(app, body())
    await until(lambda: len(engine.running) == 2)
    service.drain.cancel(OverloadedError("Shutting down."))
    assert await service.drain.wait_idle(10)
    await asyncio.gather(streaming.task, waiting.task)
    assert streaming.status == 200
    assert kinds(streaming.content)[-1] == "error"
    assert kinds(streaming.content).count("error") == 1
    assert waiting.status == 503
    assert len(engine.aborted) == 2


async def test_when_the_engine_dies_every_stream_gets_an_error(
    app: Starlette, client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    streaming = Connection(app, body("x" * 100))
    await streaming.news.wait()
    engine.gate.clear()
    waiting = Connection(app, body())
    await until(lambda: len(engine.running) == 2)
    engine.die(RuntimeError("bug"))
    await asyncio.gather(streaming.task, waiting.task)
    assert kinds(streaming.content)[-1] == "error"
    assert waiting.status == 500
    assert (await client.get("/health")).status_code == 500


async def test_tokenize_detokenize_and_stats(client: httpx.AsyncClient) -> None:
    payload = {"model": "fake", "prompt": {"kind": "text", "text": "ab"}}
    reply = TokenizeReply.model_validate_json((await client.post("/internal/tokenize", json=payload)).content)
    assert reply.token_ids == [97, 98]
    assert reply.token_strs is None
    response = await client.post("/internal/detokenize", json={"model": "fake", "token_ids": [97, 98]})
    assert response.json() == {"text": "ab"}
    stats = WorkerStats.model_validate_json((await client.get("/internal/stats")).content)
    assert stats.kv_blocks_total == 64
    assert not stats.draining


async def test_variants_over_http(engine: FakeEngine, tmp_path: Path) -> None:
    (tmp_path / "pirate").mkdir()
    service = WorkerService(engine, make_plan(), "fake", adapter_root=tmp_path)
    transport = httpx.ASGITransport(create_app(service))
    async with httpx.AsyncClient(transport=transport, base_url="http://worker/internal") as client:
        assert VariantsReply.model_validate_json((await client.get("/variants")).content).variants == []
        addition = {"name": "arr", "parent": "fake", "path": "pirate", "pinned": True}
        added = VariantStatus.model_validate_json((await client.post("/variants/add", json=addition)).content)
        assert (added.name, added.pinned, added.state) == ("arr", True, "in_host_memory")
        for change, state in (("activate", "active"), ("evict", "on_disk"), ("unpin", "on_disk"), ("pin", "on_disk")):
            reply = await client.post(f"/variants/{change}", json={"name": "arr"})
            status = VariantStatus.model_validate_json(reply.content)
            assert (status.state, status.pinned) == (state, change != "unpin")
            assert VariantsReply.model_validate_json((await client.get("/variants")).content).variants == [status]
        assert (await client.post("/variants/remove", json={"name": "arr"})).json()["state"] == "draining"
        assert (await client.get("/variants")).json() == {"variants": []}


async def test_refused_variants_over_http(engine: FakeEngine, client: httpx.AsyncClient, tmp_path: Path) -> None:
    def error(reply: httpx.Response) -> tuple[int, str, str | None]:
        event = ErrorEvent.model_validate_json(reply.content)
        return reply.status_code, event.code, event.param

    addition = {"name": "arr", "parent": "fake", "path": "pirate"}
    url = "/internal/variants"
    assert error(await client.post(f"{url}/add", json=addition)) == (403, "permission_denied", "path")
    assert error(await client.post(f"{url}/pin", json={"name": "arr"})) == (404, "model_not_found", "model")
    assert error(await client.post(f"{url}/pin", json={"names": "arr"})) == (400, "invalid_request", "name")
    assert error(await client.post(url, json=addition)) == (405, "invalid_request", None)
    (tmp_path / "pirate").mkdir()
    service = WorkerService(engine, make_plan(), "fake", adapter_root=tmp_path)
    engine.loras.refuse_with = CheckpointError("pirate/adapter_model.safetensors holds NaN.")
    transport = httpx.ASGITransport(create_app(service))
    async with httpx.AsyncClient(transport=transport, base_url="http://worker") as other:
        assert error(await other.post(f"{url}/add", json=addition)) == (400, "checkpoint_invalid", None)


async def test_the_worker_token_is_asked_for_everywhere_but_health(service: WorkerService) -> None:
    transport = httpx.ASGITransport(create_app(service, worker_token="secret"))
    async with httpx.AsyncClient(transport=transport, base_url="http://worker") as client:
        for headers in ({}, {WORKER_TOKEN_HEADER: "wrong"}, {WORKER_TOKEN_HEADER: "sécret".encode()}):
            for path in ("generate", "tokenize", "detokenize", "variants/add", "variants/remove"):
                response = await client.post(f"/internal/{path}", json=body(), headers=headers)
                assert response.status_code == 401
                assert ErrorEvent.model_validate_json(response.content).code == "invalid_api_key"
            for path in ("stats", "variants"):
                assert (await client.get(f"/internal/{path}", headers=headers)).status_code == 401
        right = {WORKER_TOKEN_HEADER: "secret"}
        assert (await client.post("/internal/generate", json=body(), headers=right)).status_code == 200
        assert (await client.get("/health")).status_code == 200

"""Streams that break, clients that go away, and what comes together."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from starlette.types import Message

from controller.openai.disconnect import run_while_connected
from controller.protocol import DeltaEvent, DoneEvent, ErrorEvent, GenerateRequest, PromptEvent
from tests.controller.openai.api import CHAT, COMPLETIONS, MODEL, Api
from tests.fakes.fake_gateway import FakeBackend, FakeGateway, Script, reply_events
from tests.fakes.until import until

BODIES: dict[str, dict[str, Any]] = {
    CHAT: {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}]},
    COMPLETIONS: {"model": MODEL, "prompt": "Once"},
}
PATHS = tuple(BODIES)

PROMPT = PromptEvent(num_prompt_tokens=1)
WORKER_FAILED = ErrorEvent(code="worker_failed", message="The worker broke off.", param=None)


def delta(text: str, **fields: Any) -> DeltaEvent:
    return DeltaEvent(index=0, text=text, num_tokens=1, **fields)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("ending", "code"),
    [([WORKER_FAILED], "worker_failed"), ([RuntimeError("a bug")], "internal_error"), ([], "internal_error")],
)
async def test_a_broken_stream_ends_with_an_error_and_without_done(
    api: Api, gateway: FakeGateway, path: str, ending: list[Any], code: str
) -> None:
    gateway.script = lambda request: [PROMPT, delta("some"), *ending]
    reply = await api.post(path, {**BODIES[path], "stream": True, "stream_options": {"include_usage": True}})
    assert reply.status == 200
    *chunks, last = [json.loads(data) for data in reply.data]
    assert "some" in json.dumps(chunks)
    assert set(last) == {"error"}
    assert set(last["error"]) == {"message", "type", "param", "code"}
    assert last["error"]["code"] == code
    assert "a bug" not in last["error"]["message"]


@pytest.mark.parametrize("path", PATHS)
async def test_a_broken_answer_that_is_not_streamed_is_an_http_error(api: Api, gateway: FakeGateway, path: str) -> None:
    gateway.script = lambda request: [PROMPT, delta("some"), WORKER_FAILED]
    reply = await api.post(path, BODIES[path])
    assert (reply.status, reply.error["message"]) == (502, WORKER_FAILED.message)
    gateway.script = lambda request: [PROMPT, delta("no end")]
    assert (await api.post(path, BODIES[path])).status == 500


@pytest.mark.parametrize("stream", [False, True])
async def test_one_of_several_prompts_fails_first(api: Api, gateway: FakeGateway, stream: bool) -> None:
    never = asyncio.Event()

    def script(request: GenerateRequest) -> Script:
        refused = ErrorEvent(code="context_length_exceeded", message="Too long.", param="prompt")
        return [refused] if request.prompt.text == "b" else [PROMPT, delta("a"), never]  # type: ignore[union-attr]

    gateway.script = script
    reply = await api.complete(prompt=["a", "b", "c"], stream=stream)
    assert (reply.status, reply.error["code"]) == (400, "context_length_exceeded")
    assert (gateway.num_open, gateway.num_closed_early) == (0, 2)


async def test_what_came_before_a_failure_is_sent(api: Api, gateway: FakeGateway) -> None:
    gateway.pause = False
    gateway.script = lambda request: [PROMPT, delta("a"), delta("b"), WORKER_FAILED]
    reply = await api.complete(stream=True)
    assert json.loads(reply.data[0])["choices"][0]["text"] == "ab"
    assert len(reply.data) == 2


async def test_events_that_are_there_come_in_one_chunk(api: Api, gateway: FakeGateway) -> None:
    gateway.pause = False
    assert [chunk["choices"][0]["text"] for chunk in (await api.complete(stream=True)).chunks] == ["Hello, wörld 😀"]


async def test_deltas_without_text_are_not_sent(api: Api, gateway: FakeGateway) -> None:
    gateway.script = lambda request: [
        PROMPT,
        delta(""),
        delta("a"),
        delta(""),
        delta("", finish_reason="stop", stop_reason="END"),
        DoneEvent(num_prompt_tokens=1, num_cached_tokens=0, num_completion_tokens=4),
    ]
    chunks = (await api.complete(stream=True)).chunks
    assert [chunk["choices"][0]["text"] for chunk in chunks] == ["a", ""]
    assert chunks[-1]["choices"][0]["stop_reason"] == "END"
    assert [chunk["choices"][0]["delta"].get("content") for chunk in (await api.chat(stream=True)).chunks] == [
        "",
        "a",
        None,
    ]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("stream", "num_events"), [(False, 0), (False, 2), (True, 0), (True, 2)])
async def test_a_client_that_goes_away_closes_the_stream_to_the_worker(
    base_url: str, backend: FakeBackend, path: str, stream: bool, num_events: int
) -> None:
    """Before the first event as well as after it, streamed or not."""
    gateway = backend.gateway
    never = asyncio.Event()
    gateway.script = lambda request: [*reply_events(request, ["a", "b"])[:num_events], never]
    body = json.dumps({**BODIES[path], "stream": stream}).encode()
    host, _, port = base_url.removeprefix("http://").partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    if stream and num_events:
        await reader.readuntil(b'"a"')
    else:
        await until(lambda: gateway.num_open == 1)
    writer.close()
    await until(lambda: gateway.num_open == 0)
    assert gateway.num_closed_early == 1
    await until(lambda: 'status="499"' in backend.metrics.render().decode())


async def test_a_client_that_does_not_read_stops_the_reading_from_the_worker(
    base_url: str, gateway: FakeGateway
) -> None:
    num_made = 0

    def script(request: GenerateRequest) -> Any:
        nonlocal num_made
        yield PROMPT
        while True:
            num_made += 1
            yield delta("x" * 4096)

    gateway.script = script
    body = json.dumps({**BODIES[COMPLETIONS], "stream": True}).encode()
    host, _, port = base_url.removeprefix("http://").partition(":")
    _, writer = await asyncio.open_connection(host, int(port), limit=1024)
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}"
    writer.write(head.encode() + b"\r\n\r\n" + body)

    async def stalled() -> None:
        before = -1
        while num_made != before or num_made == 0:
            before = num_made
            await asyncio.sleep(0.2)

    await asyncio.wait_for(stalled(), timeout=20.0)
    writer.transport.abort()
    await until(lambda: gateway.num_open == 0)


async def test_metrics_count_requests_and_tokens(api: Api, backend: FakeBackend) -> None:
    await api.chat()
    await api.chat(stream=True)
    await api.chat(n=0)
    await api.chat(model="absent")
    backend.gateway.script = lambda request: [PROMPT, WORKER_FAILED]
    await api.chat(stream=True)
    text = backend.metrics.render().decode()
    prefix = f'rootgraft_requests_total{{model="{MODEL}",route="{CHAT}"'
    assert f'{prefix},status="200"}} 2.0' in text
    assert f'{prefix},status="502"}} 1.0' in text
    assert f'rootgraft_requests_total{{model="",route="{CHAT}",status="400"}} 1.0' in text
    assert f'rootgraft_requests_total{{model="",route="{CHAT}",status="404"}} 1.0' in text
    assert f'rootgraft_requests_in_flight{{route="{CHAT}"}} 0.0' in text
    assert f'rootgraft_completion_tokens_total{{model="{MODEL}"}} 8.0' in text
    assert f'rootgraft_prompt_tokens_total{{model="{MODEL}"}} 16.0' in text


async def test_work_is_cancelled_and_waited_for_when_the_client_goes_away() -> None:
    steps: list[str] = []
    gone = asyncio.Event()

    async def receive() -> Message:
        await gone.wait()
        return {"type": "http.disconnect"}

    async def work() -> str:
        try:
            steps.append("begun")
            gone.set()
            await asyncio.Event().wait()
            return "done"
        finally:
            await asyncio.sleep(0)
            steps.append("cleaned up")

    assert await run_while_connected(receive, work()) is None
    assert steps == ["begun", "cleaned up"]


async def test_errors_of_the_work_are_raised() -> None:
    async def receive() -> Message:
        await asyncio.Event().wait()
        raise AssertionError

    async def work() -> None:
        raise ValueError("wrong")

    with pytest.raises(ValueError, match="wrong"):
        await run_while_connected(receive, work())

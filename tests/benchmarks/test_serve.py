import asyncio
import json
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from types import ModuleType
from typing import Any

import pytest
from aiohttp import web

from tests.fakes.app_server import serving
from tests.fakes.script_in_loop import run_in_this_loop


@pytest.fixture
def serve(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("serve")


class FakeServer:
    """Streams `num_tokens` words for each request; `misbehave` may answer a request by its number instead."""

    def __init__(self, *, num_tokens: int | None = None, knows_usage: bool = True) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.num_tokens = num_tokens
        self.knows_usage = knows_usage
        self.refuse_usage = False
        self.misbehave: Callable[[int, web.Request], Any] | None = None
        self.running = self.most_at_once = 0

    async def answer(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        number = len(self.bodies)
        self.bodies.append(body)
        self.headers.append(dict(request.headers))
        self.paths.append(request.path)
        if self.refuse_usage and "stream_options" in body:
            return web.json_response({"error": {"message": "unknown field stream_options"}}, status=400)
        if self.misbehave is not None and (other := await self.misbehave(number, request)) is not None:
            return other
        self.running += 1
        self.most_at_once = max(self.most_at_once, self.running)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        num_tokens = body["max_tokens"] if self.num_tokens is None else self.num_tokens
        for index in range(num_tokens):
            text = f"w{index} é "
            choice = {"text": text} if "prompt" in body else {"delta": {"content": text}}
            # Split in the middle of a line and of a character, as a network may.
            data = b"data: " + json.dumps({"choices": [choice]}, ensure_ascii=False).encode() + b"\r\n\r\n"
            cut = data.index("é".encode()) + 1
            await response.write(data[:cut])
            await asyncio.sleep(0.002)
            await response.write(data[cut:])
        if "stream_options" in body and self.knows_usage:
            usage = {"prompt_tokens": 7, "completion_tokens": num_tokens}
            await response.write(b"data:" + json.dumps({"choices": [], "usage": usage}).encode() + b"\n\n")
        await response.write(b"data: [DONE]\n\n")
        self.running -= 1
        return response


@asynccontextmanager
async def running(server: FakeServer) -> AsyncIterator[str]:
    app = web.Application()
    app.router.add_post("/v1/completions", server.answer)
    app.router.add_post("/v1/chat/completions", server.answer)
    async with serving(app) as url:
        yield url


async def call(serve: ModuleType, server: FakeServer, *arguments: str, api_key: str | None = None) -> int:
    async with running(server) as url:
        return await run_in_this_loop(serve.main, ["--url", url, *arguments], api_key)


async def test_levels_are_measured_and_written(serve, tmp_path, capsys):
    server, path = FakeServer(), tmp_path / "results.json"
    status = await call(
        serve,
        server,
        "--model",
        "m",
        "--streams",
        "1,3",
        "--output-tokens",
        "5",
        "--json",
        str(path),
        "--label",
        "fake",
    )
    assert status == 0
    report = json.loads(path.read_text())
    assert [(level["streams"], level["num_requests"]) for level in report["levels"]] == [(1, 4), (3, 6)]
    for level in report["levels"]:
        assert level["output_tokens"] == level["num_requests"] * 5
        assert level["prompt_tokens"] == level["num_requests"] * 7
        assert level["output_tokens_from"] == "usage"
        assert level["output_tokens_per_s"] == pytest.approx(level["output_tokens"] / level["wall_s"])
        assert level["num_failed"] == level["num_short"] == 0
        assert 0 < level["inter_token_s"]["p50"] <= level["inter_token_s"]["p90"] <= level["inter_token_s"]["p99"]
        assert 0 < level["ttft_s"]["p50"] < level["wall_s"]
    assert server.most_at_once == 3
    assert len(server.bodies) == 1 + 4 + 6  # a warm-up first
    assert report["label"] == "fake"
    assert "--streams 1,3" in report["command"]
    assert report["machine"]["cores"] >= 1
    assert report["machine"]["python"] == ".".join(map(str, sys.version_info[:3]))
    table = capsys.readouterr().out
    assert "| 1 | 4 | 0 | 0 |" in table
    assert "| 3 | 6 | 0 | 0 |" in table


async def test_only_fields_that_were_asked_for_are_sent(serve):
    server = FakeServer()
    assert await call(serve, server, "--model", "m", "--streams", "1", "--output-tokens", "2") == 0
    assert all(body.keys() == {"model", "stream", "prompt", "max_tokens", "stream_options"} for body in server.bodies)
    assert not any("Authorization" in headers for headers in server.headers)
    server = FakeServer()
    arguments = ("--streams", "1", "--output-tokens", "2", "--greedy", "--ignore-eos", "--endpoint", "chat")
    assert await call(serve, server, "--model", "m", *arguments, api_key="key") == 0
    for body in server.bodies:
        assert (body["temperature"], body["ignore_eos"]) == (0, True)
        assert body["messages"][0]["role"] == "user"
    assert set(server.paths) == {"/v1/chat/completions"}
    assert all(headers["Authorization"] == "Bearer key" for headers in server.headers)


async def test_prompts_are_repeatable_and_all_different_and_models_take_turns(serve):
    prompts = []
    for seed in ("3", "3", "4"):
        server = FakeServer(num_tokens=1)
        arguments = ("--streams", "1,2", "--prompt-tokens", "9", "--output-tokens", "1", "--seed", seed)
        assert await call(serve, server, "--model", "a", "--model", "b", *arguments) == 0
        sent = [body["prompt"] for body in server.bodies]
        assert len(set(sent)) == len(sent)
        assert all(len(prompt.split()) == 9 for prompt in sent)
        assert sorted(body["model"] for body in server.bodies) == ["a"] * 5 + ["b"] * 5
        prompts.append(sorted(sent))
    assert prompts[0] == prompts[1] != prompts[2]


@pytest.mark.parametrize("refuse", [False, True])
async def test_without_usage_chunks_are_counted(serve, capsys, refuse):
    server = FakeServer(knows_usage=False)
    server.refuse_usage = refuse
    assert await call(serve, server, "--model", "m", "--streams", "2", "--output-tokens", "3") == 0
    row = capsys.readouterr().out.splitlines()[-1]
    assert "| chunks |" in row
    assert ("stream_options" in server.bodies[-1]) is not refuse


async def test_answers_that_end_early_are_shown_as_short(serve, capsys):
    server = FakeServer(num_tokens=2)
    assert await call(serve, server, "--model", "m", "--streams", "1", "--output-tokens", "9") == 0
    assert "| 1 | 4 | 0 | 4 |" in capsys.readouterr().out


async def refused(number: int, request: web.Request) -> web.Response | None:
    if number == 2:
        return web.json_response({"error": {"message": "too many"}}, status=429)
    return None


async def error_in_stream(number: int, request: web.Request) -> web.Response | None:
    return web.Response(text='data: {"error": {"message": "worker lost"}}\n\n') if number == 2 else None


async def no_done(number: int, request: web.Request) -> web.Response | None:
    return web.Response(text='data: {"choices": [{"text": "x"}]}\n\n') if number == 2 else None


async def not_json(number: int, request: web.Request) -> web.Response | None:
    return web.Response(text="data: {oops\n\n") if number == 2 else None


async def broken_off(number: int, request: web.Request) -> web.Response | None:
    if number == 2:
        assert request.transport is not None
        request.transport.abort()
        return web.Response()
    return None


async def slow(number: int, request: web.Request) -> None:
    if number == 2:
        await asyncio.sleep(5)


@pytest.mark.parametrize(
    ("misbehave", "message"),
    [
        (refused, "HTTP 429: too many"),
        (error_in_stream, "error in the stream: worker lost"),
        (no_done, "the stream ended without [DONE]"),
        (not_json, "a chunk is not JSON"),
        (broken_off, "disconnected"),
        (slow, "timed out"),
    ],
)
async def test_a_failed_request_is_counted_and_shown_and_fails_the_run(serve, capsys, tmp_path, misbehave, message):
    server, path = FakeServer(), tmp_path / "results.json"
    server.misbehave = misbehave
    arguments = ("--streams", "1", "--output-tokens", "2", "--json", str(path), "--timeout-s", "1")
    assert await call(serve, server, "--model", "m", *arguments) == 1
    captured = capsys.readouterr()
    assert "| 1 | 4 | 1 | 0 |" in captured.out
    assert message in captured.err
    [level] = json.loads(path.read_text())["levels"]
    assert level["num_failed"] == 1
    assert level["output_tokens"] == 3 * 2


async def test_a_server_that_does_not_answer_is_one_line(serve, capsys):
    async with running(FakeServer()) as url:
        pass  # and gone again
    assert await run_in_this_loop(serve.main, ["--url", url, "--model", "m"], None) == 1
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert "did not answer the warm-up request" in captured.err


def test_a_missing_directory_is_found_before_the_run(serve, capsys, tmp_path):
    path = tmp_path / "missing" / "results.json"
    with pytest.raises(SystemExit) as stopped:
        serve.main(["--url", "http://127.0.0.1:1", "--model", "m", "--json", str(path)], None)
    assert stopped.value.code == 2
    assert str(path.parent) in capsys.readouterr().err


@pytest.mark.parametrize("streams", ["0", "1,x", ""])
def test_streams_must_be_positive_numbers(serve, streams):
    with pytest.raises(SystemExit) as stopped:
        serve.main(["--url", "http://127.0.0.1:1", "--model", "m", "--streams", streams], None)
    assert stopped.value.code == 2


def test_percentiles_interpolate(serve):
    found = serve.percentiles([4.0, 1.0, 3.0, 2.0])
    assert (found.p50, found.p90, found.p99) == pytest.approx((2.5, 3.7, 3.97))
    assert serve.percentiles([]) is None
    assert serve.percentiles([2.0]).p99 == 2.0

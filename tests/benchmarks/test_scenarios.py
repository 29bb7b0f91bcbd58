"""`benchmarks/scenarios.py` against a server that is quick with beginnings that it knows, slow with long prompts."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from types import ModuleType

import aiohttp
import pytest
from aiohttp import web

from tests.fakes.app_server import serving

PREFIX_WORDS, LONG_WORDS = 20, 300


@pytest.fixture
def scenarios(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("scenarios")


class Server:
    """A token every millisecond; a prompt whose beginning is new, or that is long, waits first."""

    def __init__(self) -> None:
        self.prefixes: set[str] = set()

    async def answer(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        words = body["prompt"].split()
        response = web.StreamResponse()
        await response.prepare(request)
        prefix = " ".join(words[:PREFIX_WORDS])
        if prefix not in self.prefixes or len(words) >= LONG_WORDS:
            await asyncio.sleep(0.2)
        self.prefixes.add(prefix)
        for _ in range(body["max_tokens"]):
            await response.write(b"data: " + json.dumps({"choices": [{"text": "w "}]}).encode() + b"\n\n")
            await asyncio.sleep(0.001)
        usage = {"prompt_tokens": len(words), "completion_tokens": body["max_tokens"]}
        await response.write(b"data: " + json.dumps({"choices": [], "usage": usage}).encode() + b"\n\n")
        await response.write(b"data: [DONE]\n\n")
        return response


@asynccontextmanager
async def running(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[str]:
    """The script's clock is that of the loop, in which a stall does not count."""
    monkeypatch.setattr(time, "perf_counter", asyncio.get_running_loop().time)
    app = web.Application()
    app.router.add_post("/v1/completions", Server().answer)
    async with serving(app) as url:
        yield url


async def test_later_requests_are_compared_with_the_first(
    scenarios: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(monkeypatch) as url, aiohttp.ClientSession() as session:
        found = await scenarios.Scenarios(session, url, "m", 0).shared_prefix(PREFIX_WORDS, 4)
    assert found.num_requests == 4
    assert found.first_ttft_s >= 0.2
    assert found.later_share == found.later_ttft_s.p50 / found.first_ttft_s < 1


async def test_gaps_are_told_apart_by_the_long_prompt(scenarios: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    async with running(monkeypatch) as url, aiohttp.ClientSession() as session:
        found = await scenarios.Scenarios(session, url, "m", 0).long_prompt(3, LONG_WORDS, 0.3)
    assert found.prompt_tokens == LONG_WORDS
    assert found.ttft_s >= 0.2
    assert found.longest_gap_s >= found.gaps_during_s.p50 > 0


def test_bad_numbers_are_refused(scenarios: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        scenarios.parse_arguments(["--url", "http://x", "--model", "m", "--num-requests", "1"])
    assert stopped.value.code == 2
    assert "at least 2" in capsys.readouterr().err


def test_an_unreachable_server_is_an_error(scenarios: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert scenarios.main(["--url", "http://127.0.0.1:1", "--model", "m"]) == 1
    assert "error:" in capsys.readouterr().err

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from itertools import pairwise

import pytest

from tests.fakes.fake_openai_server import FakeOpenAIServer
from tests.fakes.until import until
from webui.chat import Chat, Serving
from webui.client import ApiClient, SamplingOptions
from webui.conversation import Conversation, Message, ask

ASKED = ask([], "hello there")


@pytest.fixture
async def server() -> AsyncIterator[FakeOpenAIServer]:
    async with FakeOpenAIServer() as server:
        yield server


@pytest.fixture
async def chat(server: FakeOpenAIServer) -> AsyncIterator[Chat]:
    client = ApiClient(server.url)
    yield Chat(client)
    await client.close()


async def steps_of(
    chat: Chat, tab: str = "tab", conversation: Conversation = ASKED, model: str | None = "tiny-chat"
) -> list[tuple[Conversation, str]]:
    return [step async for step in chat.answer(tab, conversation, model, "Be brief.", SamplingOptions())]


async def test_the_answer_grows_and_ends_with_its_speed(chat: Chat, server: FakeOpenAIServer) -> None:
    server.delay_s = 0.03
    steps = await steps_of(chat)
    texts = [step[0][-1].text for step in steps if step[0][-1].role == "assistant"]
    assert texts[-1] == "You said: hello there "
    assert all(later.startswith(earlier) for earlier, later in pairwise(texts))
    assert steps[-1][1].startswith("**4 tokens**")
    assert server.requests[0]["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "hello there"},
    ]


async def test_a_fast_answer_is_shown_less_often_than_its_tokens(chat: Chat, server: FakeOpenAIServer) -> None:
    server.reply = lambda body: ["x "] * 500
    steps = await steps_of(chat)
    assert len(steps) < 250
    assert steps[-1][0][-1].text == "x " * 500


async def test_stop_closes_the_connection_and_keeps_the_text(chat: Chat, server: FakeOpenAIServer) -> None:
    server.reply = lambda body: ["x "] * 100_000
    server.delay_s = 0.001
    running = chat.answer("tab", ASKED, "tiny-chat", "", SamplingOptions())
    while (await anext(running))[0][-1].role == "user":
        pass
    chat.stop("tab")
    steps = [step async for step in running]
    assert steps[-1][0][-1].role == "assistant"
    assert steps[-1][1].endswith("stopped")
    await until(lambda: server.num_disconnects == 1)


async def test_stop_before_the_first_token(chat: Chat, server: FakeOpenAIServer) -> None:
    server.gate.clear()
    task = asyncio.create_task(steps_of(chat))
    await until(lambda: server.requests)
    chat.stop("another tab")
    chat.stop("tab")
    steps = await task
    assert steps[-1][0] == [*ASKED, Message("notice", "Stopped before the first token.")]
    await until(lambda: server.num_disconnects == 1)


async def test_a_closed_page_closes_the_connection(chat: Chat, server: FakeOpenAIServer) -> None:
    server.reply = lambda body: ["x "] * 100_000
    server.delay_s = 0.001
    running = chat.answer("tab", ASKED, "tiny-chat", "", SamplingOptions())
    while (await anext(running))[0][-1].role == "user":
        pass
    await running.aclose()
    await until(lambda: server.num_disconnects == 1)


async def test_clearing_while_an_answer_runs_leaves_nothing(chat: Chat, server: FakeOpenAIServer) -> None:
    server.gate.clear()
    task = asyncio.create_task(steps_of(chat))
    await until(lambda: server.requests)
    chat.forget("tab")
    assert (await task)[-1] == ([], "")


async def test_a_failure_keeps_what_had_come(chat: Chat, server: FakeOpenAIServer) -> None:
    server.error_after = 2
    conversation, speed = (await steps_of(chat))[-1]
    assert [(entry.role, entry.text) for entry in conversation[1:]] == [
        ("assistant", "You said: "),
        ("notice", "The worker failed. Press retry to ask again."),
    ]
    assert speed.endswith("failed")


async def test_a_controller_that_is_away_and_returns(chat: Chat, server: FakeOpenAIServer) -> None:
    await server.stop()
    assert "cannot be reached" in ((await chat.serving()).error or "")
    conversation, speed = (await steps_of(chat))[-1]
    assert conversation[-1].role == "notice"
    assert "cannot be reached" in conversation[-1].text
    assert speed == ""
    await server.start()
    assert await chat.serving() == Serving(models=("tiny-chat", "tiny-code"))
    assert (await steps_of(chat))[-1][0][-1].role == "assistant"


async def test_without_a_model_nothing_is_asked(chat: Chat, server: FakeOpenAIServer) -> None:
    assert (await steps_of(chat, model=None))[-1][0][-1].role == "notice"
    assert not server.requests


async def test_tabs_are_independent(chat: Chat, server: FakeOpenAIServer) -> None:
    server.gate.clear()
    tasks = [asyncio.create_task(steps_of(chat, tab)) for tab in ("one", "two")]
    await until(lambda: len(server.requests) == 2)
    chat.stop("one")
    stopped = await tasks[0]
    server.gate.set()
    finished = await tasks[1]
    assert stopped[-1][0][-1].role == "notice"
    assert finished[-1][0][-1].text == "You said: hello there "

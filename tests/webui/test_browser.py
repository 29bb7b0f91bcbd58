"""The page in headless Chromium, against a fake OpenAI server."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from playwright.async_api import Browser, Page, async_playwright, expect

from tests.fakes.fake_openai_server import FakeOpenAIServer
from tests.fakes.until import until
from webui.app import create_app
from webui.client import ApiClient
from webui.server import Server

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed"),
]
BOT = "#chat .bot:not(.pending)"
SCREENSHOTS = os.environ.get("SCREENSHOTS")  # a directory that keeps pictures to look at


@pytest_asyncio.fixture(loop_scope="module")
async def server() -> AsyncIterator[FakeOpenAIServer]:
    async with FakeOpenAIServer() as server:
        yield server


@pytest_asyncio.fixture(loop_scope="module")
async def url(server: FakeOpenAIServer) -> AsyncIterator[str]:
    """The web UI, serving in this event loop."""
    sock = socket.create_server(("127.0.0.1", 0))
    app = create_app(ApiClient(server.url))
    webui = Server(app)
    task = asyncio.create_task(webui.serve([sock]))
    yield f"http://127.0.0.1:{sock.getsockname()[1]}"
    webui.should_exit = True
    await task


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def browser() -> AsyncIterator[Browser]:
    expect.set_options(timeout=60_000)  # other tests may keep all cores busy
    async with async_playwright() as playwright:
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield browser
        await browser.close()


@pytest_asyncio.fixture(loop_scope="module")
async def page(browser: Browser, url: str) -> AsyncIterator[Page]:
    page = await browser.new_page(viewport={"width": 1280, "height": 860})
    page.set_default_timeout(60_000)
    await page.goto(url)
    await expect(page.locator("#serving")).to_contain_text("2 models")
    yield page
    await page.close()


async def send(page: Page, text: str) -> None:
    await page.locator("#question textarea").fill(text)
    await page.locator("#question textarea").press("Enter")


async def picture(page: Page, name: str) -> None:
    if SCREENSHOTS:
        await page.screenshot(path=Path(SCREENSHOTS) / f"{name}.png")


async def test_ask_and_see_the_answer_grow(page: Page, server: FakeOpenAIServer) -> None:
    server.reply = lambda body: ["Paris ", "is ", "the ", "capital ", "of ", "France."]
    server.gate.clear()
    await picture(page, "start")
    await send(page, "What is the capital of France?")
    await expect(page.locator("#chat .user")).to_contain_text("capital of France?")
    await expect(page.locator("#question textarea")).to_have_value("")
    await picture(page, "waiting")
    server.delay_s = 0.2
    server.gate.set()
    await expect(page.locator(BOT)).to_contain_text("Paris is")
    await expect(page.locator(BOT)).to_contain_text("Paris is the capital of France.")
    await expect(page.locator("#speed")).to_contain_text("tokens/s")
    await expect(page.locator("#speed")).to_contain_text("6 tokens")
    await picture(page, "answer")
    assert server.requests[0]["model"] == "tiny-chat"


async def test_stop_cancels_the_request_and_keeps_the_text(page: Page, server: FakeOpenAIServer) -> None:
    server.reply = lambda body: [f"word{number} " for number in range(10_000)]
    server.delay_s = 0.02
    await send(page, "Count.")
    await expect(page.locator(BOT)).to_contain_text("word3")
    await page.locator("#question .stop-button").click()
    await expect(page.locator("#speed")).to_contain_text("stopped")
    await until(lambda: server.num_disconnects == 1)
    await expect(page.locator("#question .submit-button")).to_be_visible()
    await picture(page, "stopped")
    server.reply = lambda body: ["Again."]
    await send(page, "Once more.")
    await expect(page.locator(BOT).nth(1)).to_contain_text("Again.")
    assert [message["role"] for message in server.requests[1]["messages"]] == ["user", "assistant", "user"]


async def test_regenerate_edit_and_undo(page: Page, server: FakeOpenAIServer) -> None:
    answers = iter(["first", "second", "third", "fourth"])
    server.reply = lambda body: [next(answers)]
    chat = page.locator("#chat")
    await send(page, "Question A")
    await expect(page.locator(BOT)).to_contain_text("first")

    await chat.get_by_role("button", name="Retry").click()
    await expect(page.locator(BOT)).to_contain_text("second")
    await expect(page.locator(BOT)).to_have_count(1)
    assert server.requests[1]["messages"] == [{"role": "user", "content": "Question A"}]

    await send(page, "Question B")
    await expect(page.locator(BOT).nth(1)).to_contain_text("third")
    await chat.get_by_label("Edit").first.click()
    await chat.locator("textarea").fill("Question C")
    await chat.get_by_label("Submit").click()
    await expect(chat.locator(".user")).to_have_count(1)
    await expect(page.locator(BOT)).to_have_count(1)
    await expect(page.locator(BOT)).to_contain_text("fourth")
    assert server.requests[3]["messages"] == [{"role": "user", "content": "Question C"}]

    await chat.get_by_role("button", name="Undo").click()
    await expect(chat.locator(".user")).to_have_count(0)
    await expect(page.locator("#question textarea")).to_have_value("Question C")


async def test_an_answer_can_be_edited_in_place(page: Page, server: FakeOpenAIServer) -> None:
    server.reply = lambda body: ["wrong"]
    chat = page.locator("#chat")
    await send(page, "Question")
    await expect(page.locator(BOT)).to_contain_text("wrong")
    await chat.get_by_label("Edit").last.click()
    await chat.locator("textarea").fill("right")
    await chat.get_by_label("Submit").click()
    await expect(page.locator(BOT)).to_contain_text("right")
    await send(page, "Next")
    await expect(page.locator(BOT)).to_have_count(2)
    assert server.requests[1]["messages"][1] == {"role": "assistant", "content": "right"}


async def test_a_new_chat_while_an_answer_runs(page: Page, server: FakeOpenAIServer) -> None:
    server.reply = lambda body: ["word "] * 10_000
    server.delay_s = 0.02
    await send(page, "Count.")
    await expect(page.locator(BOT)).to_contain_text("word")
    await page.locator("#new").click()
    await until(lambda: server.num_disconnects == 1)
    await expect(page.locator(BOT)).to_have_count(0)
    await expect(page.locator("#chat .user")).to_have_count(0)
    await expect(page.locator("#question .submit-button")).to_be_visible()


async def test_the_texts_of_messages_are_kept_exactly(page: Page, server: FakeOpenAIServer) -> None:
    server.reply = lambda body: ["  <b>bold</b>\n", "    indented <script>window.broken = 1</script>\n"]
    await send(page, "  <i>x</i>")
    await expect(page.locator(BOT)).to_contain_text("indented")
    assert await page.evaluate("window.broken") is None
    await send(page, "again")
    await expect(page.locator(BOT)).to_have_count(2)
    assert [message["content"] for message in server.requests[1]["messages"]] == [
        "  <i>x</i>",
        "  <b>bold</b>\n    indented <script>window.broken = 1</script>\n",
        "again",
    ]


async def test_settings_reach_the_request(page: Page, server: FakeOpenAIServer) -> None:
    await page.locator("#system textarea").fill("Be brief.")
    await page.locator("#max-tokens input[type=number]").fill("2")
    await page.get_by_text("More sampling").click()
    await page.get_by_label("Seed").fill("7")
    await page.get_by_label("Stop strings").fill("END")
    await page.locator("#model input").click()
    await page.get_by_role("option", name="tiny-code").click()
    await picture(page, "settings")
    await send(page, "one two three")
    await expect(page.locator("#speed")).to_contain_text("2 tokens")
    request = server.requests[0]
    assert request["messages"][0] == {"role": "system", "content": "Be brief."}
    assert (request["model"], request["max_tokens"], request["seed"], request["stop"]) == ("tiny-code", 2, 7, ["END"])


async def test_a_controller_that_goes_away_and_returns(page: Page, server: FakeOpenAIServer) -> None:
    await server.stop()
    await send(page, "Anybody there?")
    await expect(page.locator(BOT)).to_contain_text("cannot be reached")
    await page.locator("#refresh").click()
    await expect(page.locator("#serving")).to_contain_text("cannot be reached")
    await picture(page, "away")
    server.models = ["tiny-chat"]
    await server.start()
    await page.locator("#refresh").click()
    await expect(page.locator("#serving")).to_contain_text("1 model at")
    await page.locator("#chat").get_by_role("button", name="Retry").click()
    await expect(page.locator(BOT)).to_contain_text("You said: Anybody there?")
    assert "Traceback" not in await page.content()


async def test_a_failure_in_the_middle_keeps_what_had_come(page: Page, server: FakeOpenAIServer) -> None:
    server.error_after = 2
    await send(page, "hello")
    await expect(page.locator(BOT).first).to_contain_text("You said:")
    await expect(page.locator(BOT).last).to_contain_text("The worker failed.")
    await picture(page, "failed")


async def test_closing_the_page_cancels_the_request(page: Page, server: FakeOpenAIServer) -> None:
    server.gate.clear()
    await send(page, "Count.")
    await until(lambda: server.requests)
    await page.close()
    await until(lambda: server.num_disconnects == 1)


async def test_nothing_is_asked_of_any_other_machine(browser: Browser, url: str) -> None:
    page = await browser.new_page()
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    await page.goto(url)
    await expect(page.locator("#serving")).to_contain_text("2 models")
    await send(page, "hello")
    await expect(page.locator(BOT)).to_contain_text("You said")
    assert asked
    assert [address for address in asked if not address.startswith((url, "data:", "blob:"))] == []


async def test_the_page_works_on_a_telephone(browser: Browser, url: str) -> None:
    page = await browser.new_page(viewport={"width": 390, "height": 800})
    await page.goto(url)
    await expect(page.locator("#serving")).to_contain_text("2 models")
    await expect(page.locator("#model")).not_to_be_in_viewport()
    await send(page, "hello")
    await expect(page.locator(BOT)).to_contain_text("You said")
    await picture(page, "telephone")


async def test_the_question_stays_in_sight_beside_a_long_conversation(browser: Browser, url: str) -> None:
    for width in (390, 1280):
        page = await browser.new_page(viewport={"width": width, "height": 700})
        await page.goto(url)
        await expect(page.locator("#serving")).to_contain_text("2 models")
        await send(page, "One line.\n\n" * 60)
        await expect(page.locator(BOT)).to_contain_text("You said")
        await expect(page.locator("#question textarea")).to_be_in_viewport()
        assert await page.evaluate("document.documentElement.scrollHeight <= window.innerHeight")

"""A person with a browser: headless Chromium on the real web UI, controller, worker and model."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect, sync_playwright

from tests.e2e.processes import Cluster, Process, wait_until
from tests.fakes.ports import free_port

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.e2e,
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed"),
]
ANSWERS = "#chat .bot:not(.pending)"
SCREENSHOTS = os.environ.get("SCREENSHOTS")  # a directory that keeps pictures to look at


@pytest.fixture
def page(cluster: Cluster) -> Iterator[Page]:
    cluster.start_controller()
    cluster.start_worker("--dtype", "float32")  # its answers are long enough to be stopped
    port = free_port()
    webui = Process(cluster.directory / "webui.log", "webui", "--port", str(port), "--controller", cluster.url)
    try:
        with sync_playwright() as playwright:
            flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
            page = browser.new_page(viewport={"width": 1280, "height": 860})
            page.set_default_timeout(60_000)
            expect.set_options(timeout=60_000)
            wait_until(lambda: "http" in webui.text() or webui.popen.poll() is not None, 60, "the web UI")
            page.goto(f"http://127.0.0.1:{port}")
            expect(page.locator("#serving")).to_contain_text("1 model")
            greedy = page.get_by_label("number input for Temperature")
            greedy.fill("0")
            greedy.press("Enter")
            yield page
            browser.close()
    finally:
        webui.kill()


def send(page: Page, text: str) -> None:
    """Ask as a person does, who sees that the last answer is complete: until then the page takes no question."""
    expect(page.locator("#question .stop-button")).to_be_hidden()
    page.locator("#question textarea").fill(text)
    page.locator("#question textarea").press("Enter")


def picture(page: Page, name: str) -> None:
    if SCREENSHOTS:
        page.screenshot(path=Path(SCREENSHOTS) / f"{name}.png")


def test_a_person_asks_stops_and_sees_the_controller_leave_and_return(page: Page, cluster: Cluster) -> None:
    send(page, "What is the capital of France? Answer in one sentence.")
    expect(page.locator(ANSWERS)).to_contain_text("Paris")
    expect(page.locator("#speed")).to_contain_text("tokens/s")
    picture(page, "real-answer")

    send(page, "Tell me a very long story about the sea, with many chapters.")
    wait_until(
        lambda: page.locator(ANSWERS).count() == 2 and len(page.locator(ANSWERS).last.inner_text()) > 20,
        60,
        "the story",
    )
    assert cluster.metric("rootgraft_worker_kv_blocks_used") > 0
    page.locator("#question .stop-button").click()
    wait_until(lambda: cluster.metric("rootgraft_worker_kv_blocks_used") == 0, 60, "the engine stopped")
    expect(page.locator("#speed")).to_contain_text("stopped")
    picture(page, "real-stopped")

    assert cluster.controller is not None
    cluster.controller.kill()
    send(page, "Are you there?")
    expect(page.locator("body")).to_contain_text("controller")
    picture(page, "real-controller-away")
    cluster.start_controller()
    cluster.wait_for_workers(1)
    expect(page.locator("#serving")).to_contain_text("1 model")
    send(page, "What is the capital of France? Answer in one sentence.")
    expect(page.locator(ANSWERS).last).to_contain_text("Paris")

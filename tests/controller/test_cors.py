"""Pages of other origins: what a browser asks, and what it has to find in the answers."""

from __future__ import annotations

import json

import aiohttp
import pytest
from fastapi import FastAPI

from controller.cors import parse_origins
from registry.catalog import Catalog
from registry.errors import InvalidRequestError
from tests.controller.conftest import RunningController, StartController
from tests.controller.test_http_guard import exchange
from tests.fakes.fake_worker import FakeWorker

PAGE = "https://chat.example.org"
CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
PREFLIGHT = {
    "access-control-request-method": "POST",
    "access-control-request-headers": "authorization,content-type,x-stainless-lang",
}


async def preflight(
    controller: RunningController, path: str = "/v1/chat/completions", origin: str = PAGE
) -> aiohttp.ClientResponse:
    return await controller._request("OPTIONS", path, {"headers": {"origin": origin, **PREFLIGHT}})


def allowed(response: aiohttp.ClientResponse) -> str | None:
    return response.headers.get("access-control-allow-origin")


async def test_a_page_asks_first_and_then_streams(start_controller: StartController, catalog: Catalog) -> None:
    controller = await start_controller(allowed_origins=f"http://localhost:3000, {PAGE}", auth="required")
    _, key = catalog.create_api_key("ann", role="user", actor="test")
    answer = await preflight(controller)
    assert (answer.status, allowed(answer)) == (200, PAGE)
    assert "POST" in answer.headers["access-control-allow-methods"]
    assert "authorization" in answer.headers["access-control-allow-headers"]
    async with FakeWorker() as worker:
        await worker.register(controller.url)
        headers = {"origin": PAGE, "authorization": f"Bearer {key}"}
        response = await controller.post("/v1/chat/completions", json={**CHAT, "stream": True}, headers=headers)
        text = await response.text()
    assert (response.status, allowed(response), response.headers["vary"]) == (200, PAGE, "Origin")
    assert text.strip().endswith("data: [DONE]")


async def test_a_page_sees_why_it_is_refused_by_whatever_part(start_controller: StartController) -> None:
    def with_bug(app: FastAPI) -> None:
        @app.get("/v1/bug")
        async def bug() -> None:
            raise RuntimeError

    controller = await start_controller(allowed_origins="*", max_body_bytes=100, edit=with_bug)
    headers = {"origin": PAGE}
    post = controller.post
    refused = {
        404: await post("/v1/chat/completions", json=CHAT, headers=headers),
        413: await post("/v1/chat/completions", data="x" * 101, headers=headers),
        405: await controller.get("/v1/chat/completions", headers=headers),
        500: await controller.get("/v1/bug", headers=headers),
    }
    for status, response in refused.items():
        assert (response.status, allowed(response)) == (status, "*")
        assert (await response.json())["error"]["message"]

    both = {**headers, "content-length": "2", "transfer-encoding": "chunked"}
    head = "".join(f"{name}: {value}\r\n" for name, value in both.items())
    answer, _ = await exchange(controller, f"POST /v1/completions HTTP/1.1\r\nhost: x\r\n{head}\r\n".encode())
    assert answer.startswith(b"HTTP/1.1 400")
    assert b"access-control-allow-origin: *" in answer


async def test_a_page_sees_that_it_has_no_key(start_controller: StartController) -> None:
    controller = await start_controller(allowed_origins=PAGE, auth="required")
    response = await controller.post("/v1/chat/completions", json=CHAT, headers={"origin": PAGE})
    assert (response.status, allowed(response)) == (401, PAGE)
    assert json.loads(await response.text())["error"]["code"] == "invalid_api_key"


@pytest.mark.parametrize("path", ["/admin/variants", "/internal/register", "/v1/load_lora_adapter", "/metrics"])
async def test_what_operators_and_workers_call_is_closed_to_pages(start_controller: StartController, path: str) -> None:
    controller = await start_controller(allowed_origins="*")
    assert allowed(await preflight(controller, path)) is None
    assert allowed(await controller.get(path, headers={"origin": PAGE})) is None


@pytest.mark.parametrize(("origins", "status"), [(PAGE, 200), ("*", 400)])
async def test_only_named_pages_of_the_internet_may_call_into_a_private_network(
    start_controller: StartController, origins: str, status: int
) -> None:
    controller = await start_controller(allowed_origins=origins)
    headers = {"origin": PAGE, **PREFLIGHT, "access-control-request-private-network": "true"}
    assert (await controller._request("OPTIONS", "/v1/models", {"headers": headers})).status == status


async def test_other_pages_get_nothing(start_controller: StartController) -> None:
    controller = await start_controller(allowed_origins="https://other.example.org")
    answer = await preflight(controller)
    assert (answer.status, allowed(answer)) == (400, None)
    assert allowed(await controller.get("/v1/models", headers={"origin": PAGE})) is None


async def test_nothing_is_allowed_unless_asked_for(start_controller: StartController) -> None:
    controller = await start_controller()
    answer = await preflight(controller)
    assert (answer.status, allowed(answer)) == (405, None)
    assert allowed(await controller.get("/v1/models", headers={"origin": PAGE})) is None


@pytest.mark.parametrize(
    ("text", "origins"),
    [
        (None, ()),
        ("", ()),
        ("*", ("*",)),
        ("HTTPS://Chat.example.org , http://localhost:3000,", ("https://chat.example.org", "http://localhost:3000")),
        ("https://a.org:443,http://[::1]:80,http://a:8080", ("https://a.org", "http://[::1]", "http://a:8080")),
        ("http://[::1]:3000,app://obsidian.md", ("http://[::1]:3000", "app://obsidian.md")),
    ],
)
def test_origins(text: str | None, origins: tuple[str, ...]) -> None:
    assert parse_origins(text) == origins


@pytest.mark.parametrize(
    "text", ["example.org", "https://a.org/", "https://a.org/chat", '["*"]', "https://*.a.org", "null", f"*,{PAGE}"]
)
def test_what_no_page_has_as_its_origin_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequestError, match="--allowed-origins: ") as caught:
        parse_origins(text)
    assert caught.value.param == "allowed_origins"

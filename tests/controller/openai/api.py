"""A raw HTTP client: what the official client would hide, tests must see."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import aiohttp

MODEL = "org/tiny"
CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"


@dataclass(frozen=True, slots=True)
class Reply:
    status: int
    headers: dict[str, str]  # names in lower case
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """The error object, whose shape is checked."""
        error: dict[str, Any] = self.json["error"]
        assert set(self.json) == {"error"}
        assert set(error) == {"message", "type", "param", "code"}
        assert error["message"]
        return error

    @property
    def data(self) -> list[str]:
        """The payloads of an event stream, whose framing is checked."""
        assert self.body.endswith(b"\n\n")
        events = self.body.decode().removesuffix("\n\n").split("\n\n")
        assert all(event.startswith("data: ") and "\n" not in event for event in events)
        return [event.removeprefix("data: ") for event in events]

    @property
    def chunks(self) -> list[dict[str, Any]]:
        """The chunks of a stream that ended well."""
        *chunks, done = self.data
        assert done == "[DONE]"
        return [json.loads(chunk) for chunk in chunks]


@dataclass(frozen=True, slots=True)
class Api:
    session: aiohttp.ClientSession

    async def post(self, path: str, body: Any, **headers: str) -> Reply:
        """POST `body`: bytes as they are, anything else as JSON."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        sent = {"Content-Type": "application/json", **{name.replace("_", "-"): text for name, text in headers.items()}}
        async with self.session.post(path, data=content, headers=sent) as response:
            return await _reply(response)

    async def get(self, path: str) -> Reply:
        async with self.session.get(path) as response:
            return await _reply(response)

    async def chat(self, **fields: Any) -> Reply:
        """A chat completion with the least that it needs and `fields`."""
        return await self.post(CHAT, {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], **fields})

    async def complete(self, **fields: Any) -> Reply:
        """A completion with the least that it needs and `fields`."""
        return await self.post(COMPLETIONS, {"model": MODEL, "prompt": "Once", **fields})


async def _reply(response: aiohttp.ClientResponse) -> Reply:
    headers = {name.lower(): value for name, value in response.headers.items()}
    return Reply(response.status, headers, await response.read())

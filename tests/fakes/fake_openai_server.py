"""A server with the part of the OpenAI API that the web UI uses, with faults that a test chooses."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from types import TracebackType
from typing import Any

from aiohttp import web

from tests.fakes.restartable_server import RestartableServer

API_KEY = "sk-fake"


class FakeOpenAIServer(RestartableServer):
    """Answers with words.

    Attributes:
        models: names served.
        reply: words of the answer to a request body; each becomes a chunk.
        gate: while it is cleared, no chunk is sent.
        delay_s: between two chunks.
        requests: bodies of the chat requests, in order.
        num_disconnects: answers that the client did not wait for.
        refuse_with: (status, body) of every answer.
        error_after: send an error event after so many chunks.
        break_after: close the connection after so many chunks.
    """

    def __init__(self) -> None:
        super().__init__()
        self.models = ["tiny-chat", "tiny-code"]
        self.reply: Callable[[dict[str, Any]], list[str]] = lambda body: [
            word + " " for word in f"You said: {body['messages'][-1]['content']}".split(" ")
        ]
        self.gate = asyncio.Event()
        self.gate.set()
        self.delay_s = 0.0
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.num_disconnects = 0
        self.refuse_with: tuple[int, bytes] | None = None
        self.error_after: int | None = None
        self.break_after: int | None = None

    def make_app(self) -> web.Application:
        app = web.Application()
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/v1/chat/completions", self._chat)
        return app

    async def __aexit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self.gate.set()
        await super().__aexit__(kind, error, trace)

    async def _models(self, request: web.Request) -> web.Response:
        self.headers.append(dict(request.headers))
        if self.refuse_with:
            return web.Response(status=self.refuse_with[0], body=self.refuse_with[1])
        return web.json_response({"object": "list", "data": [{"id": name, "object": "model"} for name in self.models]})

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        self.headers.append(dict(request.headers))
        body = await request.json()
        self.requests.append(body)
        if self.refuse_with:
            return web.Response(status=self.refuse_with[0], body=self.refuse_with[1])
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        try:
            await self._stream(request, response, body)
        except (asyncio.CancelledError, ConnectionError):
            self.num_disconnects += 1
            raise
        return response

    async def _stream(self, request: web.Request, response: web.StreamResponse, body: dict[str, Any]) -> None:
        words = self.reply(body)[: body.get("max_tokens")]
        await response.prepare(request)
        await _send(response, _chunk({"role": "assistant", "content": ""}))
        for position, word in enumerate(words):
            await self.gate.wait()
            await asyncio.sleep(self.delay_s)
            if self.error_after == position:
                await _send(response, {"error": {"message": "The worker failed.", "type": "server_error"}})
                return
            if self.break_after == position:
                assert request.transport is not None
                request.transport.close()
                return
            await _send(response, _chunk({"content": word}))
        await _send(response, _chunk({}, finish_reason="stop"))
        usage = {"prompt_tokens": 7, "completion_tokens": len(words), "total_tokens": 7 + len(words)}
        await _send(response, {"choices": [], "usage": usage})
        await response.write(b"data: [DONE]\n\n")


def _chunk(delta: dict[str, str], finish_reason: str | None = None) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": finish_reason}], "usage": None}


async def _send(response: web.StreamResponse, event: dict[str, Any]) -> None:
    await response.write(b"data: " + json.dumps(event).encode() + b"\n\n")

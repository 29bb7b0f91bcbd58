"""Answers as server-sent events.

    await the first events ──► 200, headers ──► data: {chunk} … data: {usage} data: [DONE]
              │ fails                                 │ fails
              └─► an ordinary error status            └─► data: {"error": …}, and no [DONE]

The official clients take a clean end without [DONE] for a complete answer, so a broken stream must say that it is one.
"""

from __future__ import annotations

import logging
from contextlib import ExitStack
from functools import cached_property
from typing import Protocol

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from controller.errors_http import error_object
from controller.metrics import CLIENT_CLOSED, RequestObserver
from controller.openai.disconnect import run_while_connected
from controller.openai.event_source import EventSource
from controller.openai.generation import ChoiceText, Generation
from controller.openai.json_bytes import encode_json, encode_str
from controller.openai.schemas_responses import Usage
from registry.errors import InternalError, RootgraftError

logger = logging.getLogger(__name__)

DONE = b"data: [DONE]\n\n"

_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}


class ChunkEncoder(Protocol):
    """Writes what choices gain as the chunks of one kind of answer."""

    def gain(self, choice: int, gain: ChoiceText) -> bytes:
        """Chunks, or nothing where there is nothing to show yet."""

    def end(self, usage: Usage) -> bytes:
        """What follows the last chunk of the last choice."""


class ChunkFrame:
    """The constant parts of the chunks of one stream, encoded once.

    A chunk is `data: {id, object, created, model, system_fingerprint, "choices":[CHOICE]USAGE}` and an empty line.
    """

    def __init__(self, generation: Generation, object_name: str, *, include_usage: bool) -> None:
        self._generation = generation
        self._object_name = object_name
        self._include_usage = include_usage
        self._tail = b'],"usage":null}\n\n' if include_usage else b"]}\n\n"

    def chunk(self, choice: bytes) -> bytes:
        """One chunk with `choice`, an encoded JSON object."""
        return self._head + choice + self._tail

    def end(self, usage: Usage) -> bytes:
        if not self._include_usage:
            return DONE
        return self._head + b'],"usage":' + encode_json(usage) + b"}\n\n" + DONE

    @cached_property
    def _head(self) -> bytes:
        """Known when the first event has come."""
        identity = self._generation.identity
        return b'data: {"id":%b,"object":%b,"created":%d,"model":%b,"system_fingerprint":%b,"choices":[' % (
            encode_str(identity.id),
            encode_str(self._object_name),
            identity.created,
            encode_str(identity.model),
            encode_json(self._generation.fingerprint),
        )


class EventStreamResponse(Response):
    """Streams a generation, and cancels it when the client goes away.

    Args:
        held: released when the stream has ended; holds `observer`'s context.

    Raises (from the ASGI call):
        RootgraftError: the request failed before its first event, so nothing was sent yet.
    """

    media_type = "text/event-stream"

    def __init__(
        self, generation: Generation, encoder: ChunkEncoder, observer: RequestObserver, held: ExitStack
    ) -> None:
        super().__init__(headers={**_HEADERS, "x-request-id": generation.identity.id})
        del self.headers["content-length"]
        self._generation = generation
        self._encoder = encoder
        self._observer = observer
        self._held = held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._held:
            if not await run_while_connected(receive, self._stream(send)):
                self._observer.finish(CLIENT_CLOSED)

    async def _stream(self, send: Send) -> bool:
        async with self._generation.events() as events:
            await events.accepted()
            self._generation.accept()
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            end = await self._send_chunks(events, send)
            await send({"type": "http.response.body", "body": end, "more_body": False})
        return True

    async def _send_chunks(self, events: EventSource, send: Send) -> bytes:
        """Send all but the end, which is returned: usage and [DONE], or the error that ended the stream."""
        try:
            async for batch in events:
                gains = self._generation.gained(batch)
                body = b"".join([self._encoder.gain(choice, gain) for choice, gain in gains.items()])
                if body:
                    await send({"type": "http.response.body", "body": body, "more_body": True})
        except RootgraftError as error:
            return self._failed(error)
        except Exception:  # whatever broke, the client must not take what it has for the whole answer
            logger.exception("A stream broke off.")
            return self._failed(InternalError("internal error; see the controller's log"))
        return self._encoder.end(self._generation.usage.to_json())

    def _failed(self, error: RootgraftError) -> bytes:
        self._observer.finish(error.status)
        return b"data: " + encode_json(error_object(error)) + b"\n\n"

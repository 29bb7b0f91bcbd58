"""The streamed answer to POST /internal/generate."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from contextlib import aclosing

from starlette.types import Receive, Scope, Send

from controller.protocol import DoneEvent, ErrorEvent, GenerateRequest
from model_worker.events import Event, error_event
from model_worker.service import WorkerService
from registry.errors import InternalError, RootgraftError

logger = logging.getLogger(__name__)

KEEP_ALIVE_S = 2.0
"""How long a stream may be silent, seconds; well below what a controller waits for a byte (--worker-timeout)."""


class GenerateResponse:
    """An ASGI application that streams one request as NDJSON, one write for each engine step.

    The status is sent with the first line, so that a request refused before it has a status of its own. The caller
    closing the connection aborts the request in the engine at once, also while it still waits for its first token.

    A request that waits, in the queue or for its prompt to be computed, gets a blank line every `keep_alive_s` seconds,
    so that it is not taken for one of a worker that hangs. An engine that computes nothing gives no such lines.
    """

    def __init__(self, service: WorkerService, request: GenerateRequest, *, keep_alive_s: float = KEEP_ALIVE_S) -> None:
        self._service = service
        self._request = request
        self._keep_alive_s = keep_alive_s
        self._silent = True  # since the last look of _keep_alive
        self._started = False  # the status is sent
        self._ended = False  # a terminal event is sent

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        producer = asyncio.create_task(self._produce(send))
        watchers = (asyncio.create_task(_disconnected(receive)), asyncio.create_task(self._keep_alive(send)))
        tasks = (producer, *watchers)
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()  # has no effect on one that is done
            await asyncio.wait(tasks)
        if not producer.cancelled():
            producer.result()  # raises what it raised

    async def _produce(self, send: Send) -> None:
        task = asyncio.current_task()
        assert task is not None
        drain = self._service.drain
        with drain.request(task):
            try:
                async with aclosing(self._service.generate(self._request)) as steps:
                    async for events in steps:
                        await self._write(send, events)
            except asyncio.CancelledError:
                if drain.cancelled_with is None:
                    raise  # the caller is gone
                await self._end_with(send, drain.cancelled_with)
            except RootgraftError as error:
                await self._end_with(send, error)
            except Exception:
                # Whatever broke, an accepted stream must end in a terminal event.
                if not self._started:
                    raise
                logger.exception("request %s failed", self._request.request_id)
                await self._end_with(send, InternalError("The worker failed on this request; its log says why."))
            else:
                await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _end_with(self, send: Send, error: RootgraftError) -> None:
        if not self._started:
            raise error  # still becomes a status
        if not self._ended:
            await self._write(send, [error_event(error)])
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _keep_alive(self, send: Send) -> None:
        num_steps = self._service.num_steps
        while True:
            self._silent = True
            await asyncio.sleep(self._keep_alive_s)
            before, num_steps = num_steps, self._service.num_steps
            if self._silent and not self._ended and num_steps > before:
                await self._send_lines(send, b"\n")

    async def _write(self, send: Send, events: Sequence[Event]) -> None:
        self._ended = isinstance(events[-1], DoneEvent | ErrorEvent)
        lines = "".join([event.model_dump_json(exclude_none=True) + "\n" for event in events])
        await self._send_lines(send, lines.encode())

    async def _send_lines(self, send: Send, lines: bytes) -> None:
        self._silent = False
        if not self._started:
            self._started = True
            headers = [(b"content-type", b"application/x-ndjson"), (b"cache-control", b"no-store")]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": lines, "more_body": True})


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass

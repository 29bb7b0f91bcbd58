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


class GenerateResponse:
    """An ASGI application that streams one request as NDJSON, one write for each engine step.

    The status is sent with the first events, so that a request refused before them has a status of its own. The caller
    closing the connection aborts the request in the engine at once, also while it still waits for its first token.
    """

    def __init__(self, service: WorkerService, request: GenerateRequest) -> None:
        self._service = service
        self._request = request
        self._started = False  # the status is sent
        self._ended = False  # a terminal event is sent

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        producer = asyncio.create_task(self._produce(send))
        watcher = asyncio.create_task(_disconnected(receive))
        try:
            await asyncio.wait((producer, watcher), return_when=asyncio.FIRST_COMPLETED)
        finally:
            watcher.cancel()
            producer.cancel()  # has no effect when it is done
            await asyncio.wait((producer, watcher))
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

    async def _write(self, send: Send, events: Sequence[Event]) -> None:
        if not self._started:
            self._started = True
            headers = [(b"content-type", b"application/x-ndjson"), (b"cache-control", b"no-store")]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
        self._ended = isinstance(events[-1], DoneEvent | ErrorEvent)
        lines = "".join(event.model_dump_json(exclude_none=True) + "\n" for event in events)
        await send({"type": "http.response.body", "body": lines.encode(), "more_body": True})


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass

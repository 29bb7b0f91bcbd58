"""The events of a request with one prompt, read by the task that writes the answer: no task and no queue between."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from types import TracebackType
from typing import Self

from controller.openai.backend import Event
from controller.openai.event_source import Batch, broken_off, error_of
from controller.protocol import ErrorEvent
from registry.errors import RootgraftError


class SingleEvents:
    """An EventSource. While its reader is busy, events wait in the bounded buffer of the connection to the worker."""

    def __init__(self, stream: AsyncGenerator[list[Event], None]) -> None:
        self._stream = stream
        self._first: Batch = []  # read by `accepted`, not handed out yet
        self._failure: RootgraftError | None = None
        self._ended = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._stream.aclose()

    async def accepted(self) -> None:
        """Wait for the first event. Raises: RootgraftError, when the request was refused."""
        self._first = await self._next()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Batch:
        """Raises: RootgraftError, when the stream failed."""
        if self._first:
            batch, self._first = self._first, []
            return batch
        if self._ended:
            raise StopAsyncIteration
        return await self._next()

    async def _next(self) -> Batch:
        if self._failure is not None:
            raise self._failure
        events = await anext(self._stream, None)
        if events is None:
            raise broken_off()
        batch: Batch = []
        for event in events:
            if isinstance(event, ErrorEvent):
                self._failure = error_of(event)
                if not batch:
                    raise self._failure
                break
            batch.append((0, event))
            self._ended = event.kind == "done"
        return batch

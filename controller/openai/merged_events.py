"""The event streams of one request's several prompts, read concurrently and handed out in the order of the events.

    gateway.stream(prompt 0) ─► task ─┐
    gateway.stream(prompt 1) ─► task ─┼─► at most MAX_WAITING_EVENTS ─► batches of all that is there
    gateway.stream(prompt 2) ─► task ─┘

A batch is whatever arrived while the reader was busy, so that a slow client gets few large writes. A reader that does
not read stops the tasks, and they the connections to the workers, so that nothing piles up here.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from types import TracebackType
from typing import Self

from controller.openai.backend import Event
from controller.openai.event_source import Batch, broken_off, error_of
from controller.protocol import ErrorEvent

MAX_WAITING_EVENTS = 256


class MergedEvents:
    """An EventSource. A failure of one stream, an ErrorEvent too, is the end of all."""

    def __init__(self, streams: Sequence[AsyncGenerator[list[Event], None]]) -> None:
        self._streams = streams
        self._waiting: Batch = []
        self._news = asyncio.Event()
        self._room = asyncio.Event()
        self._num_open = len(streams)
        self._num_accepted = 0
        self._failure: Exception | None = None
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        self._tasks = [asyncio.create_task(self._read(index, stream)) for index, stream in enumerate(self._streams)]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)  # failures are in _failure, see _read

    async def accepted(self) -> None:
        """Wait until every stream has had its first event, so that an error can still be an HTTP status.

        It waits no longer when the buffer is full: the last prompts may wait for places that the first ones hold.

        Raises:
            RootgraftError: one of the prompts was refused.
        """
        while self._num_accepted < len(self._streams) and len(self._waiting) < MAX_WAITING_EVENTS:
            if self._failure is not None:
                break
            await self._next_news()
        if self._failure is not None and self._num_accepted < len(self._streams):
            raise self._failure

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Batch:
        """Raises: RootgraftError, when a stream failed."""
        while not self._waiting:
            if self._failure is not None:
                raise self._failure
            if not self._num_open:
                raise StopAsyncIteration
            await self._next_news()
        batch, self._waiting = self._waiting, []
        self._room.set()
        return batch

    async def _next_news(self) -> None:
        self._news.clear()
        await self._news.wait()

    async def _read(self, index: int, stream: AsyncGenerator[list[Event], None]) -> None:
        accepted = ended = False
        try:
            async with aclosing(stream):
                async for events in stream:
                    for event in events:
                        if self._failure is not None:
                            return  # another stream failed, and what came before that is all that the reader gets
                        if isinstance(event, ErrorEvent):
                            raise error_of(event)
                        while len(self._waiting) >= MAX_WAITING_EVENTS:
                            self._room.clear()
                            await self._room.wait()
                        self._waiting.append((index, event))
                        if not accepted:
                            accepted = True
                            self._num_accepted += 1
                        ended = event.kind == "done"
                        self._news.set()
            if not ended:
                raise broken_off()
        except Exception as error:  # of whatever kind: the reader raises it in the task that can answer
            if self._failure is None:
                self._failure = error
        finally:
            self._num_open -= 1
            self._news.set()

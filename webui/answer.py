"""One answer while it comes in."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from types import TracebackType
from typing import Self

from webui.client import ApiClient, ApiError, SamplingOptions
from webui.measurement import Measurement

DISPLAY_INTERVAL_S = 0.05
"""Each change travels to the browser with the whole conversation's difference; more than this nobody can read."""


class Answer:
    """Receives one answer in a task of its own, so that the display may take its time. An asynchronous context manager:
    leaving it closes the connection, which cancels the request in the engine.

    Attributes:
        text: what came so far.
        error: why it failed, if it did.
        stopped: it was stopped by the person.
        forgotten: the conversation that it belongs to was cleared.
        measurement: how fast it came.
    """

    def __init__(
        self,
        client: ApiClient,
        model: str,
        messages: Sequence[Mapping[str, str]],
        options: SamplingOptions,
        *,
        clock: Callable[[], float],
    ) -> None:
        self.text = ""
        self.error: str | None = None
        self.stopped = False
        self.forgotten = False
        self.measurement = Measurement(clock)
        self._client = client
        self._request = (model, messages, options)
        self._news = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._receive())
        self._task.add_done_callback(lambda task: self._news.set())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._task is not None
        self._task.cancel()
        await asyncio.wait((self._task,))

    def stop(self) -> None:
        """Close the connection; `changes` then ends."""
        if self._task is not None and not self._task.done():
            self.stopped = True
            self.measurement.end("stopped")
            self._task.cancel()

    async def changes(self) -> AsyncGenerator[None, None]:
        """Yields at once, then whenever there is news, at most every DISPLAY_INTERVAL_S, and after the last of them."""
        assert self._task is not None
        yield
        while not self._task.done():
            await self._news.wait()
            self._news.clear()
            yield
            await asyncio.wait((self._task,), timeout=DISPLAY_INTERVAL_S)
        if not self._task.cancelled():
            self._task.result()  # raises what was no ApiError
        yield

    async def _receive(self) -> None:
        try:
            async with aclosing(self._client.stream_chat(*self._request)) as chunks:
                async for chunk in chunks:
                    self.text += chunk.text
                    self.measurement.add(chunk)
                    self._news.set()
        except ApiError as error:
            self.error = str(error)
            self.measurement.end("failed")

"""Which requests run, and how a worker stops taking them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from registry.errors import OverloadedError, RootgraftError


class Drain:
    """The running requests of one worker.

    States: open → draining (`begin`: what runs goes on, nothing new) → cancelled (`cancel`: what runs is told to end).
    """

    def __init__(self) -> None:
        self.draining = False
        self.cancelled_with: RootgraftError | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def num_running(self) -> int:
        return len(self._tasks)

    @contextmanager
    def request(self, task: asyncio.Task[None]) -> Iterator[None]:
        """Count `task` as a running request.

        Raises:
            OverloadedError: the worker is draining.
        """
        if self.draining:
            raise OverloadedError("This worker is shutting down; send the request again.")
        self._tasks.add(task)
        self._idle.clear()
        try:
            yield
        finally:
            self._tasks.discard(task)
            if not self._tasks:
                self._idle.set()

    def begin(self) -> None:
        self.draining = True

    async def wait_idle(self, timeout_s: float) -> bool:
        """Wait until no request runs; False when some still do after `timeout_s`."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        return self._idle.is_set()

    def cancel(self, error: RootgraftError) -> None:
        """End all running requests; each of them finds `error` in `cancelled_with` and reports it to its client."""
        self.draining = True
        self.cancelled_with = error
        for task in self._tasks:
            task.cancel()

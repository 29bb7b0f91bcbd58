"""An event loop whose clock stands still while the process is kept from running.

Tests run the controller, workers and clients in one event loop, with timeouts of tenths of a second. On a machine with
other work to do the whole process may stand for longer than that; then every timer would be due at once, and a timeout
would strike before the answer that was sent in time. Here a stall counts as `MAX_STALL_S`, whatever it took.
"""

from __future__ import annotations

import asyncio
import selectors
import time

MAX_STALL_S = 0.01


class PatientLoop(asyncio.SelectorEventLoop):
    """An event loop that counts the time it waits as it was asked to, and any other stretch as MAX_STALL_S at most."""

    def __init__(self) -> None:
        self._now_s = 0.0
        self._counted_until_s = time.monotonic()
        super().__init__(_PatientSelector(self))

    def time(self) -> float:
        """Seconds since the loop was made, without stalls."""
        self.count()
        return self._now_s

    def count(self, waited_s: float = 0.0) -> None:
        """Count the time since the last call; of it up to `waited_s` seconds were waited for on purpose."""
        now_s = time.monotonic()
        self._now_s += min(now_s - self._counted_until_s, waited_s + MAX_STALL_S)
        self._counted_until_s = now_s


class _PatientSelector(selectors.DefaultSelector):
    def __init__(self, loop: PatientLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        self._loop.count()
        events = super().select(timeout)
        self._loop.count(waited_s=float("inf") if timeout is None else max(timeout, 0.0))
        return events

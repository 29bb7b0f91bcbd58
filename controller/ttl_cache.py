"""A small cache whose entries are believed for a fixed time."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Awaitable, Callable, Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class TTLCache(Generic[K, V]):
    """Holds the `max_entries` latest answers, each for `ttl_s` seconds of `clock`."""

    def __init__(self, *, ttl_s: float, max_entries: int, clock: Callable[[], float]) -> None:
        self._ttl_s = ttl_s
        self._max_entries = max_entries
        self._clock = clock
        self._entries: OrderedDict[K, tuple[float, V]] = OrderedDict()  # key → (end of belief, value), oldest first

    async def get(self, key: K, look_up: Callable[[], Awaitable[V]]) -> V:
        """The cached value of `key`, or what `look_up` gives; an exception of it is not cached."""
        # The answer is as old as the moment at which it was asked for.
        now = self._clock()
        cached = self._entries.get(key)
        if cached is not None and now < cached[0]:
            return cached[1]
        value = await look_up()
        self._entries[key] = (now + self._ttl_s, value)
        self._entries.move_to_end(key)
        while len(self._entries) > self._max_entries:
            self._entries.popitem(last=False)
        return value

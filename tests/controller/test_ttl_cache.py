from __future__ import annotations

import pytest

from controller.ttl_cache import TTLCache


class Source:
    def __init__(self) -> None:
        self.num_asked = 0

    async def ask(self) -> int:
        self.num_asked += 1
        return self.num_asked


async def test_answers_are_believed_for_their_time() -> None:
    now, source = 0.0, Source()
    cache: TTLCache[str, int] = TTLCache(ttl_s=2.0, max_entries=8, clock=lambda: now)
    assert [await cache.get("a", source.ask), await cache.get("a", source.ask)] == [1, 1]
    now = 1.9
    assert await cache.get("a", source.ask) == 1
    now = 2.0
    assert await cache.get("a", source.ask) == 2


async def test_the_oldest_answers_make_room() -> None:
    source = Source()
    cache: TTLCache[int, int] = TTLCache(ttl_s=9.0, max_entries=2, clock=lambda: 0.0)
    for key in (1, 2, 3):
        await cache.get(key, source.ask)
    assert await cache.get(3, source.ask) == 3
    assert await cache.get(1, source.ask) == 4


async def test_failures_are_not_kept() -> None:
    async def fail() -> int:
        raise OSError

    cache: TTLCache[str, int] = TTLCache(ttl_s=9.0, max_entries=2, clock=lambda: 0.0)
    with pytest.raises(OSError):
        await cache.get("a", fail)
    assert await cache.get("a", Source().ask) == 1

"""A script's `main` against a server of the test, both in the test's own event loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import pytest


async def run_in_this_loop(main: Callable[..., int], *arguments: object) -> int:
    """Call `main` in a thread; what it gives to asyncio.run runs in this loop, and its clock is this loop's.

    So there is one clock for the script and for the server that it measures, and in tests a stall does not count in it.
    """
    loop = asyncio.get_running_loop()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(asyncio, "run", lambda coroutine: asyncio.run_coroutine_threadsafe(coroutine, loop).result())
        patch.setattr(time, "perf_counter", loop.time)
        return await asyncio.to_thread(main, *arguments)

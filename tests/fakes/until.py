"""Waiting for what another task does."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

TIMEOUT_S = 20.0
_STEP_S = 0.001


async def until(condition: Callable[[], object]) -> None:
    """Return as soon as `condition()` is true.

    Raises:
        TimeoutError: it is not within TIMEOUT_S.
    """
    for _ in range(round(TIMEOUT_S / _STEP_S)):
        if condition():
            return
        await asyncio.sleep(_STEP_S)
    raise TimeoutError("The condition did not become true.")

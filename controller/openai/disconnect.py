"""Work that is not worth finishing when nobody waits for it any more."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.types import Receive

logger = logging.getLogger(__name__)

_T = TypeVar("_T")


async def run_while_connected(receive: Receive, work: Coroutine[Any, Any, _T]) -> _T | None:
    """Await `work`, or cancel it as soon as the client goes away, and then return None.

    Cancelled work is waited for, so that its `finally` blocks have run when this returns. The request's body must have
    been read.

    Raises: what `work` raises.
    """
    task = asyncio.create_task(work)
    watcher = asyncio.create_task(_until_disconnect(receive))
    try:
        await asyncio.wait((task, watcher), return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        await _cancel(task, watcher)


async def _until_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _cancel(*tasks: asyncio.Task[Any]) -> None:
    pending = [task for task in tasks if task.cancel()]
    for outcome in await asyncio.gather(*pending, return_exceptions=True):
        if isinstance(outcome, Exception):
            logger.error("Work for a client that went away failed while it was cancelled.", exc_info=outcome)

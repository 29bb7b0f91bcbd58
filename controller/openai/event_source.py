"""Where the events of one request come from, for those who write its answer."""

from __future__ import annotations

from types import TracebackType
from typing import Protocol, Self

from controller.protocol import DeltaEvent, DoneEvent, ErrorEvent, PromptEvent
from registry.errors import InternalError, RootgraftError, error_from_code

Batch = list[tuple[int, PromptEvent | DeltaEvent | DoneEvent]]
"""What arrived together: (index of the prompt, event)."""


class EventSource(Protocol):
    """The events of a request while the context lasts; leaving it closes its streams, which cancels what has not ended.

        async with source as events:
            await events.accepted()
            async for batch in events: ...

    A batch is whatever arrived while the reader was busy, so that a slow client gets few large writes; a reader that
    does not read stops the reading from the workers, so that nothing piles up here. A failure, an ErrorEvent too, is
    raised to the reader after the events that came before it.
    """

    async def __aenter__(self) -> Self: ...
    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...

    async def accepted(self) -> None:
        """Wait until the request is accepted, so that an error can still be an HTTP status.

        Raises:
            RootgraftError: it was refused.
        """

    def __aiter__(self) -> Self: ...

    async def __anext__(self) -> Batch:
        """Raises: RootgraftError, when a stream failed."""


def error_of(event: ErrorEvent) -> RootgraftError:
    """What an ErrorEvent reports, to be raised."""
    return error_from_code(event.code, event.message, param=event.param, retry_after_s=event.retry_after_s)


def broken_off() -> InternalError:
    """For a stream without a terminal event."""
    return InternalError("The answer broke off without an end; send the request again.")

"""Bounds on the requests that the controller takes: bytes of a body, and requests in progress at once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from controller.auth import principal_of
from controller.config import LimitsConfig
from controller.errors_http import response_for
from controller.metrics import Metrics
from controller.places import Places
from registry.errors import InvalidRequestError, RateLimitError, RequestTooLargeError, RootgraftError

_WEIGHT_OF_NEWEST = 0.05  # in the running mean

_MAX_DROPPED_BYTES = 64 * 1024 * 1024  # of a body that is too large
_MAX_DROPPING_S = 5.0

STREAMED_PATHS = ("/admin/blobs/",)  # their bodies are files, with bounds of their own, and are written as they come


class ConcurrencyLimits:
    """Counts the requests in progress, in total and of each API key, and measures how long they last.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, config: LimitsConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._max_per_key = config.max_concurrent_requests_per_key
        self._all = Places(config.max_concurrent_requests)
        self._of_key: dict[str, Places] = {}  # of keys with a request in progress
        self._mean_s: float | None = None  # that a request lasts

    @contextmanager
    def acquire(self, key_id: str | None) -> Iterator[None]:
        """Count one request as long as the context lasts; `key_id` is None for callers without a key.

        Raises:
            RateLimitError: too many are in progress already; `retry_after_s` is set where one has ended before.
        """
        if self._all.all_taken:
            raise RateLimitError(
                f"{self._all.num_taken} requests are in progress, the most that this controller takes; try again later",
                retry_after_s=self._all.refuse(self._mean_s),
            )
        of_key = None if key_id is None else self._of_key.get(key_id, Places(self._max_per_key))
        if of_key is not None and of_key.all_taken:
            raise RateLimitError(
                f"this API key has {of_key.num_taken} requests in progress, the most that one key may have; "
                "wait for one to end",
                retry_after_s=of_key.refuse(self._mean_s),
            )
        taken = [self._all]
        if key_id is not None and of_key is not None:
            taken.append(of_key)
            self._of_key[key_id] = of_key
        for places in taken:
            places.take()
        start_s = self._clock()
        try:
            yield
        finally:
            self._ended(self._clock() - start_s)
            for places in taken:
                places.leave()
            if key_id is not None and of_key is not None and not of_key.num_taken:
                del self._of_key[key_id]

    def _ended(self, seconds: float) -> None:
        mean_s = seconds if self._mean_s is None else self._mean_s
        self._mean_s = mean_s + _WEIGHT_OF_NEWEST * (seconds - mean_s)


class LimitsMiddleware:
    """Reads the body, refuses one that is too large, and counts requests that do work (POST) while they last.

    The app gets the body as one message. Every body here is one JSON document that its route needs whole, and an error
    raised while a route reads its body would reach the client as a parse error.
    """

    def __init__(self, app: ASGIApp, *, limits: ConcurrencyLimits, metrics: Metrics, max_body_bytes: int) -> None:
        self._app = app
        self._limits = limits
        self._metrics = metrics
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"].startswith(STREAMED_PATHS):
            await self._app(scope, receive, send)
            return
        body = _Body(Headers(scope=scope), receive)
        refusal: RootgraftError | None = None
        with ExitStack() as held:
            try:
                if scope["method"] == "POST" and not scope["path"].startswith("/internal/"):
                    principal = principal_of(scope)
                    held.enter_context(self._limits.acquire(principal.key_id if principal else None))
                content = await body.read(self._max_body_bytes)
            except RootgraftError as error:
                refusal = error
            else:
                if content is not None:
                    await self._app(scope, _replay(content, receive), send)
        if refusal is not None:
            await body.drop_rest()
            self._metrics.reject(refusal.status)
            await response_for(scope["path"], refusal)(scope, receive, send)


class _Body:
    """The body of a request, as it comes."""

    def __init__(self, headers: Headers, receive: Receive) -> None:
        self._declared = headers.get("content-length", "0")
        self._more = "content-length" in headers or "transfer-encoding" in headers
        self._waits_for_word = "expect" in headers  # and gets it by the first reading
        self._receive = receive

    async def read(self, max_bytes: int) -> bytes | None:
        """All of it; None when the client went away before its end.

        Raises:
            InvalidRequestError: its length is no number.
            RequestTooLargeError: it is longer than allowed.
        """
        if not self._declared.isdecimal():
            raise InvalidRequestError("the Content-Length is not a number")
        content = bytearray()
        while self._more:
            if max(int(self._declared), len(content)) > max_bytes:
                raise _too_large(max_bytes)
            self._waits_for_word = False
            message = await self._receive()
            if message["type"] == "http.disconnect":
                return None
            content += message.get("body", b"")
            self._more = message.get("more_body", False)
        if len(content) > max_bytes:
            raise _too_large(max_bytes)
        return bytes(content)

    async def drop_rest(self) -> None:
        """Before a refusal, read on to the end if that comes soon.

        Clients that read nothing before they have sent all would find the connection closed.
        """
        num_left = _MAX_DROPPED_BYTES
        with suppress(TimeoutError):
            async with asyncio.timeout(_MAX_DROPPING_S):
                while self._more and not self._waits_for_word and num_left > 0:
                    message = await self._receive()
                    self._more = message["type"] != "http.disconnect" and message.get("more_body", False)
                    num_left -= len(message.get("body", b""))


def _too_large(max_bytes: int) -> RequestTooLargeError:
    return RequestTooLargeError(
        f"the request body has more than {max_bytes} bytes; send a shorter one, or start the controller with a larger "
        "--max-body-bytes"
    )


def _replay(content: bytes, receive: Receive) -> Receive:
    """A `receive` that gives a body in one message first."""
    unread: list[Message] = [{"type": "http.request", "body": content, "more_body": False}]

    async def replay() -> Message:
        return unread.pop() if unread else await receive()

    return replay

"""Bounds on the requests that the controller takes: bytes of a body, and requests in progress at once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

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
        if scope["method"] != "POST" or scope["path"].startswith("/internal/"):
            await self._with_body(scope, receive, send)
            return
        principal = principal_of(scope)
        with ExitStack() as held:
            try:
                held.enter_context(self._limits.acquire(principal.key_id if principal else None))
            except RateLimitError as error:
                await self._refuse(error, scope, receive, send)
                return
            await self._with_body(scope, receive, send)

    async def _with_body(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        if "content-length" not in headers and "transfer-encoding" not in headers:
            await self._app(scope, receive, send)
            return
        try:
            body = await self._read(headers, receive)
        except RootgraftError as error:
            await self._refuse(error, scope, receive, send)
            return
        if body is None:
            return  # the client is gone
        unread: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return unread.pop() if unread else await receive()

        await self._app(scope, replay, send)

    async def _read(self, headers: Headers, receive: Receive) -> bytes | None:
        """The whole body; None when the client went away before its end."""
        declared = headers.get("content-length", "0")
        if not declared.isdecimal():
            raise InvalidRequestError("the Content-Length is not a number")
        if int(declared) > self._max_body_bytes:
            await _drop_rest(receive)
            raise self._too_large()
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > self._max_body_bytes:
                if more:
                    await _drop_rest(receive)
                raise self._too_large()
            if not more:
                return bytes(body)

    def _too_large(self) -> RequestTooLargeError:
        return RequestTooLargeError(
            f"the request body has more than {self._max_body_bytes} bytes; send a shorter one, or start the controller "
            "with a larger --max-body-bytes"
        )

    async def _refuse(self, error: RootgraftError, scope: Scope, receive: Receive, send: Send) -> None:
        self._metrics.reject(error.status)
        await response_for(scope["path"], error)(scope, receive, send)


async def _drop_rest(receive: Receive) -> None:
    """Read a body to its end, if that comes soon: clients that read nothing before they have sent all would
    find the connection closed."""
    num_left = _MAX_DROPPED_BYTES
    while num_left > 0:
        message = await receive()
        if message["type"] == "http.disconnect" or not message.get("more_body", False):
            return
        num_left -= len(message.get("body", b""))

"""Bounds on the requests that the controller takes: bytes of a body, and requests in progress at once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from controller.auth import principal_of
from controller.config import LimitsConfig
from controller.errors_http import response_for
from controller.metrics import Metrics
from registry.errors import InvalidRequestError, RateLimitError, RequestTooLargeError, RootgraftError


class ConcurrencyLimits:
    """Counts the requests in progress, in total and of each API key."""

    def __init__(self, config: LimitsConfig) -> None:
        self._max_total = config.max_concurrent_requests
        self._max_per_key = config.max_concurrent_requests_per_key
        self._total = 0
        self._of_key: Counter[str] = Counter()

    @property
    def num_in_progress(self) -> int:
        return self._total

    @contextmanager
    def acquire(self, key_id: str | None) -> Iterator[None]:
        """Count one request as long as the context lasts; `key_id` is None for callers without a key.

        Raises:
            RateLimitError: too many are in progress already.
        """
        if self._total >= self._max_total:
            raise RateLimitError(
                f"{self._total} requests are in progress, the most that this controller takes; try again later",
                retry_after_s=1.0,
            )
        if key_id is not None and self._of_key[key_id] >= self._max_per_key:
            raise RateLimitError(
                f"this API key has {self._of_key[key_id]} requests in progress, the most that one key may have; "
                "wait for one to end",
                retry_after_s=1.0,
            )
        self._total += 1
        if key_id is not None:
            self._of_key[key_id] += 1
        try:
            yield
        finally:
            self._total -= 1
            if key_id is not None:
                self._of_key[key_id] -= 1
                if not self._of_key[key_id]:
                    del self._of_key[key_id]


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
        if scope["type"] != "http":
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
            raise self._too_large()
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            if len(body) > self._max_body_bytes:
                raise self._too_large()
            if not message.get("more_body", False):
                return bytes(body)

    def _too_large(self) -> RequestTooLargeError:
        return RequestTooLargeError(
            f"the request body has more than {self._max_body_bytes} bytes; send a shorter one, or start the controller "
            "with a larger --max-body-bytes"
        )

    async def _refuse(self, error: RootgraftError, scope: Scope, receive: Receive, send: Send) -> None:
        self._metrics.reject(error.status)
        await response_for(scope["path"], error)(scope, receive, send)

"""Refuses requests whose framing two HTTP parsers could read differently, and answers unreadable ones in our shape.

h11 accepts a request with both Content-Length and Transfer-Encoding and lets the latter win, as RFC 9112 section 6.1
allows; a proxy before us that lets the former win would see other requests than we do (request smuggling). Nobody sends
both in good faith, so it gets a 400 and the connection is closed.
"""

from __future__ import annotations

import json

import h11
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from controller.errors_http import error_object, response_for
from registry.errors import InvalidRequestError


class HttpGuardMiddleware:
    """The outermost middleware: it must see the headers before anybody reads the body."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            names = {name for name, _ in scope["headers"]}
            if b"content-length" in names and b"transfer-encoding" in names:
                error = InvalidRequestError("a request has Content-Length or Transfer-Encoding, never both; send one")
                await response_for(scope["path"], error, headers={"connection": "close"})(scope, receive, send)
                return
        await self._app(scope, receive, send)


class GuardedH11Protocol(H11Protocol):
    """uvicorn's h11 protocol with a JSON answer to what is not HTTP."""

    def send_400_response(self, msg: str) -> None:
        cycle = self.cycle
        if cycle is not None and not cycle.response_complete:
            # The body of a request that is being answered became unreadable: the answer can no longer be ours.
            cycle.disconnected = True
            cycle.message_event.set()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = json.dumps(error_object(InvalidRequestError(f"{msg.rstrip('.')}; send HTTP/1.1"))).encode()
            headers = [
                ("content-type", "application/json"),
                ("content-length", str(len(body))),
                ("connection", "close"),
            ]
            for event in (
                h11.Response(status_code=400, headers=headers, reason=b"Bad Request"),
                h11.Data(data=body),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

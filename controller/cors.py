"""Web pages of other origins may call the public API, where `--allowed-origins` says so (CORS).

A browser asks before it sends a key or JSON across origins, and shows the page only answers that name its origin. What
operators and workers call (`controller.auth`) stays closed to pages: on a loopback address it asks for no keys.
"""

from __future__ import annotations

import re

from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from controller.auth import is_public
from registry.errors import InvalidRequestError

ANY = "*"
_USUAL_PORTS = {"http": ":80", "https": ":443"}
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^\s/?#@,*\[\]\"']+|https?://\[[0-9a-f:]+\](:\d+)?")


def parse_origins(text: str | None) -> tuple[str, ...]:
    """Read comma-separated origins, or `*` alone.

    Raises:
        InvalidRequestError: one of them is none, so that no page could ever have it.
    """
    origins = tuple(filter(None, (part.strip().lower() for part in (text or "").split(","))))
    for origin in origins:
        if origin != ANY and _ORIGIN.fullmatch(origin) is None:
            raise InvalidRequestError(
                f"--allowed-origins: {origin!r} is not an origin; write scheme, host and port as in "
                "https://chat.example.org or http://localhost:3000, without a path, or * for all pages",
                param="allowed_origins",
            )
    if ANY in origins and len(origins) > 1:
        raise InvalidRequestError(
            "--allowed-origins: * allows all pages; leave it or the others out", param="allowed_origins"
        )
    return tuple(map(_as_browsers_write, origins))


def _as_browsers_write(origin: str) -> str:
    """Without the port that its scheme has anyhow."""
    scheme, _, rest = origin.partition("://")
    return origin.removesuffix(_USUAL_PORTS[scheme]) if rest and scheme in _USUAL_PORTS else origin


class CorsMiddleware:
    """Answers preflights for the public API and names allowed origins in all its answers.

    It belongs around the whole application: also pages have to see why they are refused, by whatever part of it.
    Keys come in a header that the page itself sets, so browsers need send no cookies.
    """

    def __init__(self, app: ASGIApp, origins: tuple[str, ...]) -> None:
        self._app = app
        self._public = CORSMiddleware(
            app,
            allow_origins=origins,
            allow_methods=("GET", "HEAD", "POST"),
            allow_headers=("*",),
            expose_headers=("retry-after",),
            allow_private_network=ANY not in origins,  # pages from the internet, where they are named, may call it too
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        public = scope["type"] == "http" and is_public(scope["path"])
        await (self._public if public else self._app)(scope, receive, send)

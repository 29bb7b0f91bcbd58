"""Whether a request comes from one of our workers."""

from __future__ import annotations

import hmac

from starlette.requests import Request

from controller.protocol import WORKER_TOKEN_HEADER
from controller.trusted_networks import is_loopback
from registry.errors import AuthenticationError, PermissionDeniedError


def check_worker(request: Request, token: str | None) -> None:
    """Raises AuthenticationError or PermissionDeniedError unless a worker asks."""
    if token:
        given = request.headers.get(WORKER_TOKEN_HEADER, "")
        if not hmac.compare_digest(given.encode("utf-8", "surrogateescape"), token.encode()):
            raise AuthenticationError(
                "the worker token is missing or wrong; give the worker the controller's ROOTGRAFT_WORKER_TOKEN"
            )
    elif request.client is not None and not is_loopback(request.client.host):
        raise PermissionDeniedError(
            "this controller has no worker token, so only workers on its own machine may join; "
            "start both with the same ROOTGRAFT_WORKER_TOKEN"
        )

"""Who may call what: API keys as bearer tokens.

    /health                      open
    /internal/*                  workers, see controller.internal
    /admin/*                     admin keys
    /v1/load_lora_adapter and /v1/unload_lora_adapter
                                 admin keys
    /metrics                     admin keys; open where the controller listens on a loopback address
    everything else              any key

Without required keys all of it is open.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from controller.config import AuthConfig
from controller.errors_http import response_for
from controller.metrics import Metrics
from controller.trusted_networks import is_loopback
from controller.ttl_cache import TTLCache
from registry.errors import AuthenticationError, PermissionDeniedError, RootgraftError

Access = Literal["open", "key", "admin"]

CACHE_S = 2.0  # how long a revoked key may still pass
_CACHE_ENTRIES = 4096
_ADMIN_PATHS = frozenset({"/admin", "/v1/load_lora_adapter", "/v1/unload_lora_adapter"})


@dataclass(frozen=True, slots=True)
class Principal:
    """The holder of an API key."""

    key_id: str
    name: str
    admin: bool


def keys_required(config: AuthConfig, host: str) -> bool:
    """What `--auth` means for a controller that listens on `host`."""
    return config.auth == "required" or (config.auth == "auto" and not is_loopback(host))


def is_public(path: str) -> bool:
    """Whether `path` is for clients, with a key or without; others are for operators and workers."""
    return not (path in _ADMIN_PATHS or path == "/metrics" or path.startswith(("/admin/", "/internal/")))


def principal_of(scope: Scope) -> Principal | None:
    """The caller of a request that AuthMiddleware let through; None when no key was asked for."""
    principal: Principal | None = scope.get("rootgraft.principal")
    return principal


def who_asks(scope: Scope, user: str | None) -> str | None:
    """The person behind a request: the client's own user, as it names them, else the client; None: nobody knows."""
    principal = principal_of(scope)
    key_id = "" if principal is None else principal.key_id
    return f"{key_id}\0{user}" if user else key_id or None


def actor_of(scope: Scope) -> str:
    """Who asks for a change, for the catalog's audit log."""
    principal = principal_of(scope)
    return "api" if principal is None else principal.key_id


class Authenticator:
    """Checks bearer tokens against the catalog; answers, negative ones too, are remembered for CACHE_S seconds.

    Args:
        find_key: looks a key up by its secret; blocking, so it runs in a thread.
        required: whether keys are asked for at all.
        metrics_open: whether /metrics is open although keys are required.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        find_key: Callable[[str], Principal | None],
        *,
        required: bool,
        metrics_open: bool,
        clock: Callable[[], float],
    ) -> None:
        self._find_key = find_key
        self._required = required
        self._metrics_open = metrics_open
        self._cache: TTLCache[bytes, Principal | None] = TTLCache(
            ttl_s=CACHE_S, max_entries=_CACHE_ENTRIES, clock=clock
        )

    def access(self, path: str) -> Access:
        """What a request for `path` needs."""
        if not self._required or path == "/health" or path.startswith("/internal/"):
            return "open"
        if path == "/metrics" and self._metrics_open:
            return "open"
        return "key" if is_public(path) else "admin"

    async def authenticate(self, path: str, authorization: str | None) -> Principal | None:
        """The caller of `path` by its Authorization header; None where no key is needed.

        Raises:
            AuthenticationError: no key, or one that does not exist or is revoked.
            PermissionDeniedError: an admin key is needed.
        """
        access = self.access(path)
        if access == "open":
            return None
        scheme, _, secret = (authorization or "").partition(" ")
        secret = secret.strip()
        if scheme.lower() != "bearer" or not secret:
            raise AuthenticationError("no API key given; send the header `Authorization: Bearer KEY`")
        principal = await self._look_up(secret)
        if principal is None:
            raise AuthenticationError("the API key is wrong or revoked; ask an operator for a new one")
        if access == "admin" and not principal.admin:
            raise PermissionDeniedError(f"{path} needs an admin key; `python -m controller keys create --admin`")
        return principal

    async def _look_up(self, secret: str) -> Principal | None:
        digest = hashlib.sha256(secret.encode("utf-8", "surrogateescape")).digest()  # the cache holds no secrets
        return await self._cache.get(digest, lambda: asyncio.to_thread(self._find_key, secret))


class AuthMiddleware:
    """Refuses a request that lacks its key before anything else reads it, and names the caller in the scope."""

    def __init__(self, app: ASGIApp, *, authenticator: Authenticator, metrics: Metrics) -> None:
        self._app = app
        self._authenticator = authenticator
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            path = scope["path"]
            try:
                principal = await self._authenticator.authenticate(path, Headers(scope=scope).get("authorization"))
            except RootgraftError as error:
                self._metrics.reject(error.status)
                await response_for(path, error)(scope, receive, send)
                return
            scope["rootgraft.principal"] = principal
        await self._app(scope, receive, send)

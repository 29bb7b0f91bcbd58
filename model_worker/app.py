"""The HTTP side of a worker: the worker half of controller/protocol.py, as a Starlette application."""

from __future__ import annotations

import hmac
import math
from collections.abc import Awaitable, Callable
from typing import TypeVar

from pydantic import BaseModel, ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from controller.protocol import (
    WORKER_TOKEN_HEADER,
    AddVariantRequest,
    DetokenizeRequest,
    ErrorEvent,
    GenerateRequest,
    NamedVariantRequest,
    TokenizeRequest,
    VariantsReply,
    VariantStatus,
)
from model_worker.events import error_event
from model_worker.generate_response import KEEP_ALIVE_S, GenerateResponse
from model_worker.service import WorkerService
from registry.errors import (
    AuthenticationError,
    InternalError,
    InvalidRequestError,
    RequestTooLargeError,
    RootgraftError,
)

MAX_BODY_BYTES = 32 * 2**20

M = TypeVar("M", bound=BaseModel)


def create_app(
    service: WorkerService,
    *,
    worker_token: str | None = None,
    max_body_bytes: int = MAX_BODY_BYTES,
    keep_alive_s: float = KEEP_ALIVE_S,
) -> Starlette:
    """Args: keep_alive_s: as in GenerateResponse."""

    async def generate(request: Request) -> GenerateResponse:
        return GenerateResponse(service, await read(request, GenerateRequest), keep_alive_s=keep_alive_s)

    async def tokenize(request: Request) -> Response:
        return _reply(await service.tokenize(await read(request, TokenizeRequest)))

    async def detokenize(request: Request) -> Response:
        return _reply(await service.detokenize(await read(request, DetokenizeRequest)))

    async def stats(request: Request) -> Response:
        return _reply(service.stats())

    async def variants(request: Request) -> Response:
        return _reply(VariantsReply(variants=await service.variants.statuses()))

    async def add_variant(request: Request) -> Response:
        return _reply(await service.variants.add(await read(request, AddVariantRequest)))

    def named(change: Callable[[str], Awaitable[VariantStatus]]) -> Callable[[Request], Awaitable[Response]]:
        async def endpoint(request: Request) -> Response:
            return _reply(await change((await read(request, NamedVariantRequest)).name))

        return endpoint

    async def health(request: Request) -> Response:
        if service.failed is not None:
            return _error(InternalError("The engine died; restart this worker."))
        if service.drain.draining:
            return Response(b'{"status":"draining"}', 503, media_type="application/json")
        return Response(b'{"status":"ok"}', media_type="application/json")

    async def read(request: Request, message: type[M]) -> M:
        return _parse(await _body(request, max_body_bytes), message)

    return Starlette(
        routes=[
            Route("/internal/generate", generate, methods=["POST"]),
            Route("/internal/tokenize", tokenize, methods=["POST"]),
            Route("/internal/detokenize", detokenize, methods=["POST"]),
            Route("/internal/stats", stats, methods=["GET"]),
            Route("/internal/variants", variants, methods=["GET"]),
            Route("/internal/variants/add", add_variant, methods=["POST"]),
            Route("/internal/variants/remove", named(service.variants.remove), methods=["POST"]),
            Route("/internal/variants/pin", named(service.variants.pin), methods=["POST"]),
            Route("/internal/variants/unpin", named(service.variants.unpin), methods=["POST"]),
            Route("/internal/variants/activate", named(service.variants.activate), methods=["POST"]),
            Route("/internal/variants/evict", named(service.variants.evict), methods=["POST"]),
            Route("/health", health, methods=["GET"]),
        ],
        middleware=[Middleware(WorkerTokenMiddleware, worker_token=worker_token)],
        exception_handlers={
            RootgraftError: _on_rootgraft_error,
            HTTPException: _on_http_exception,
            Exception: _on_bug,
        },
    )


class WorkerTokenMiddleware:
    """Lets only those in who know the worker token; /health is open."""

    def __init__(self, app: ASGIApp, worker_token: str | None) -> None:
        self._app = app
        self._token = None if worker_token is None else worker_token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self._token is not None and scope["path"].startswith("/internal/"):
            given = dict(scope["headers"]).get(WORKER_TOKEN_HEADER.encode(), b"")
            if not hmac.compare_digest(given, self._token):
                error = AuthenticationError(
                    "The worker token is missing or wrong; give controller and worker the same ROOTGRAFT_WORKER_TOKEN."
                )
                await _error(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)


async def _body(request: Request, max_body_bytes: int) -> bytes:
    chunks: list[bytes] = []
    num_bytes = 0
    async for chunk in request.stream():
        num_bytes += len(chunk)
        if num_bytes > max_body_bytes:
            raise RequestTooLargeError(f"The request is larger than {max_body_bytes} bytes; send less.")
        chunks.append(chunk)
    return b"".join(chunks)


def _parse(body: bytes, message: type[M]) -> M:
    try:
        return message.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        param = ".".join(str(part) for part in first["loc"]) or None
        raise InvalidRequestError(
            f"Not a valid {message.__name__}: {param or 'body'}: {first['msg']}. Controller and worker must run the "
            "same version.",
            param=param,
        ) from error


def _reply(message: BaseModel) -> Response:
    return Response(message.model_dump_json(), media_type="application/json")


def _error(error: RootgraftError) -> Response:
    headers = {} if error.retry_after_s is None else {"retry-after": str(math.ceil(error.retry_after_s))}
    body = error_event(error).model_dump_json()
    return Response(body, error.status, headers=headers, media_type="application/json")


async def _on_rootgraft_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RootgraftError)
    return _error(error)


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}."
    body = ErrorEvent(code=InvalidRequestError.code, message=message).model_dump_json()
    return Response(body, error.status_code, headers=error.headers, media_type="application/json")


async def _on_bug(request: Request, error: Exception) -> Response:
    """Starlette raises the error again after this, so that the server logs it with its traceback."""
    return _error(InternalError("The worker failed on this request; its log says why."))

"""Every error as an HTTP response in the OpenAI shape: {"error": {"message", "type", "param", "code"}}.

`param` and `code` are a string or null. Below /internal/ the body is the protocol's ErrorEvent instead. 429 and 503
carry Retry-After, 401 carries WWW-Authenticate.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from controller.protocol import ErrorEvent
from registry.errors import ClientError, InternalError, InvalidRequestError, RootgraftError

logger = logging.getLogger(__name__)

DEFAULT_RETRY_AFTER_S = 1.0

_PUBLIC_PATHS = "/v1/chat/completions, /v1/completions, /v1/models, /tokenize and /detokenize"
_MAX_SHOWN_CHARS = 80  # of an unknown path


class RouteNotFoundError(ClientError):
    status = 404
    code = "not_found"


class MethodNotAllowedError(ClientError):
    status = 405
    code = "method_not_allowed"


def error_object(error: RootgraftError) -> dict[str, Any]:
    """The OpenAI error object of `error`, as it also ends a broken event stream."""
    return {"error": {"message": error.message, "type": error.type, "param": error.param, "code": error.code}}


def error_response(error: RootgraftError, *, headers: Mapping[str, str] | None = None) -> JSONResponse:
    return JSONResponse(error_object(error), status_code=error.status, headers={**_headers(error), **(headers or {})})


def internal_error_response(error: RootgraftError, *, headers: Mapping[str, str] | None = None) -> Response:
    """The answer to a worker: the ErrorEvent of the protocol."""
    event = ErrorEvent(
        code=error.code, message=error.message, param=error.param, retry_after_s=error.retry_after_s
    )  # fmt: skip
    return Response(
        event.model_dump_json(),
        status_code=error.status,
        media_type="application/json",
        headers={**_headers(error), **(headers or {})},
    )


def response_for(path: str, error: RootgraftError, *, headers: Mapping[str, str] | None = None) -> Response:
    """The response to a request for `path`, in the shape that its callers read."""
    build = internal_error_response if path.startswith("/internal/") else error_response
    return build(error, headers=headers)


def validation_error(errors: Sequence[Any]) -> InvalidRequestError:
    """The first of pydantic's errors as ours; `param` is written messages[0].content."""
    first = errors[0]
    location = [part for part in first["loc"] if part not in ("body", "query", "path")]
    param = ""
    for part in location:
        param += f"[{part}]" if isinstance(part, int) else f".{part}" if param else str(part)
    if first["type"] == "json_invalid":
        return InvalidRequestError("the request body is not valid JSON; send one JSON object")
    if first["type"] == "extra_forbidden":
        return InvalidRequestError(f"unknown field {param!r}; remove it", param=param or None)
    message = str(first["msg"]).removeprefix("Value error, ")
    return InvalidRequestError(f"{param}: {message}" if param else message, param=param or None)


def install_error_handlers(app: FastAPI) -> None:
    """Answer every error of `app`'s routes, and of routing itself, in our shape."""

    async def on_rootgraft_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, RootgraftError)
        if error.status >= 500:
            logger.warning("%s %s: %s", request.method, request.url.path, error.message)
        return response_for(request.url.path, error)

    async def on_validation_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return response_for(request.url.path, validation_error(error.errors()))

    async def on_http_exception(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return response_for(request.url.path, _of_http_exception(request, error), headers=error.headers)

    async def on_unhandled(request: Request, error: Exception) -> Response:
        # Starlette raises the error again after this answer, so the server logs it with its traceback.
        return response_for(request.url.path, InternalError("internal error; see the controller's log"))

    app.add_exception_handler(RootgraftError, on_rootgraft_error)
    app.add_exception_handler(RequestValidationError, on_validation_error)
    app.add_exception_handler(HTTPException, on_http_exception)
    app.add_exception_handler(Exception, on_unhandled)


def _of_http_exception(request: Request, error: HTTPException) -> RootgraftError:
    if error.status_code == 404:
        return RouteNotFoundError(
            f"there is no {request.url.path[:_MAX_SHOWN_CHARS]} here; clients use {_PUBLIC_PATHS}, and the base URL "
            "that OpenAI's clients are given ends in /v1"
        )
    if error.status_code == 405:
        return MethodNotAllowedError(f"{request.method} is not allowed on {request.url.path}")
    if error.status_code < 500:
        return InvalidRequestError(str(error.detail))
    return InternalError(str(error.detail))


def _headers(error: RootgraftError) -> dict[str, str]:
    if error.status == 401:
        return {"www-authenticate": "Bearer"}
    if error.status in (429, 503):
        return {"retry-after": str(max(1, math.ceil(error.retry_after_s or DEFAULT_RETRY_AFTER_S)))}
    return {}

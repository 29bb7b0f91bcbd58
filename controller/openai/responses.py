"""Responses and their descriptions that several endpoints share."""

from __future__ import annotations

from typing import Any

from starlette.responses import Response

from controller.metrics import CLIENT_CLOSED
from controller.openai.schemas_responses import ErrorObject

_ERRORS = {
    400: "The request is wrong; `param` names the field.",
    401: "No API key, or one that is not known.",
    404: "No such model.",
    413: "The body is too large.",
    429: "Too many requests; see Retry-After.",
    502: "A worker failed.",
    503: "Nobody can take the request now; see Retry-After.",
}


def client_gone() -> Response:
    """Nobody reads it, but an endpoint has to return something."""
    return Response(status_code=CLIENT_CLOSED)


def error_responses() -> dict[int | str, dict[str, Any]]:
    """The error answers of an operation, for its OpenAPI description."""
    return {status: {"model": ErrorObject, "description": description} for status, description in _ERRORS.items()}

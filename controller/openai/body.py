"""Request bodies: strict JSON, then a strict pydantic model; everything wrong with one is an InvalidRequestError.

Stricter than `json.loads` and pydantic's defaults on purpose: NaN, Infinity, lone surrogates, trailing text and deep
nesting are refused by the parser, and "1" is not 1, true is not 1 and 1.0 is not an integer.
"""

from __future__ import annotations

import copy
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails, from_json
from starlette.requests import Request

from registry.errors import InvalidRequestError

MAX_SHOWN_CHARS = 60  # of a wrong value, in the message about it

# Fields whose parts have names of their own, so that `param` names the part ("messages[0].role").
_FIELDS_WITH_PARTS = frozenset({"messages", "stream_options", "loras"})

_Model = TypeVar("_Model", bound="RequestModel")


class RequestModel(BaseModel):
    """Base of all request bodies and their parts: no coercion, no unknown fields, no NaN or Infinity."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, frozen=True)


async def read_request(request: Request, model: type[_Model]) -> _Model:
    """Read and check the body of `request`. A field of the body that is null counts as left out.

    Raises:
        InvalidRequestError: not declared as JSON, not JSON, or not what `model` describes; `param` names the field.
        starlette.requests.ClientDisconnect: the client went away before the body was complete.
    """
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    # Browsers send other types anywhere without asking first (CORS preflight); on loopback no key is asked for.
    if media_type != "application/json" and not media_type.endswith("+json"):
        raise InvalidRequestError("Send the body as JSON with the header Content-Type: application/json.")
    return parse_body(await request.body(), model)


def parse_body(body: bytes, model: type[_Model]) -> _Model:
    """As read_request, for a body that is already here."""
    try:
        value = from_json(body, allow_inf_nan=False, cache_strings="keys")
    except ValueError as error:
        raise InvalidRequestError(f"The body is not valid JSON: {error}.") from error
    if not isinstance(value, dict):
        raise InvalidRequestError("The body must be a JSON object.")
    try:
        return model.model_validate({name: field for name, field in value.items() if field is not None})
    except ValidationError as error:
        raise _invalid_request(error) from error


def openapi_body(model: type[RequestModel]) -> dict[str, Any]:
    """The `requestBody` of `model` for an operation's `openapi_extra`, with nested schemas written out in place."""
    schema = model.model_json_schema(mode="validation")
    definitions = schema.pop("$defs", {})
    schema = _inlined(schema, definitions)
    required = schema.get("required", [])
    schema["properties"] = {
        name: field if name in required or _nullable(field) else {"anyOf": [field, {"type": "null"}]}
        for name, field in schema["properties"].items()
    }
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def _nullable(field: dict[str, Any]) -> bool:
    return {"type": "null"} in field.get("anyOf", []) or field.get("type") == "null"


def _inlined(schema: Any, definitions: dict[str, Any]) -> Any:
    if isinstance(schema, dict):
        if "$ref" in schema:
            return _inlined(copy.deepcopy(definitions[schema["$ref"].rpartition("/")[2]]), definitions)
        return {key: _inlined(value, definitions) for key, value in schema.items()}
    if isinstance(schema, list):
        return [_inlined(item, definitions) for item in schema]
    return schema


def _invalid_request(error: ValidationError) -> InvalidRequestError:
    details = error.errors(include_url=False)[0]
    param = _param(details["loc"])
    return InvalidRequestError(_message(details, param), param=param)


def _message(details: ErrorDetails, param: str) -> str:
    match details["type"]:
        case "missing":
            return f"{param} is required."
        case "extra_forbidden":
            return f"Unknown field {param}; leave it out."
        case "none_required":
            return f"{param} is not supported by this server; leave it out."
        case "too_short":
            return f"{param} must not be empty."
        case "too_long":
            context = details["ctx"]
            if not context["max_length"]:
                return f"{param} must be empty."
            return f"{param} must hold at most {context['max_length']} items, not {context['actual_length']}."
        case "model_type" | "dict_type":
            return f"{param} should be an object, got {_shown(details['input'])}."
        case "not_supported":
            return details["msg"]
    rule = details["msg"].removeprefix("Input should ")
    shown = _shown(details["input"])
    return f"{param} should {rule}, got {shown}." if rule != details["msg"] else f"{param}: {rule}, got {shown}."


def _shown(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= MAX_SHOWN_CHARS else f"{shown[:MAX_SHOWN_CHARS]}…"


def _param(location: tuple[int | str, ...]) -> str:
    param = str(location[0])[:MAX_SHOWN_CHARS]
    if param not in _FIELDS_WITH_PARTS:
        return param
    for part in location[1:]:
        param += f"[{part}]" if isinstance(part, int) else f".{part[:MAX_SHOWN_CHARS]}"
    return param

"""JSON as this API writes it: UTF-8, compact, and without line separators that some clients would split a line at."""

from __future__ import annotations

import json
from json.encoder import encode_basestring
from typing import Any

from starlette.responses import Response

# No line ends in an event stream, but str.splitlines() takes them for some, and so do the line readers of many clients.
_LINE_SEPARATORS = {"\x85": "\\u0085", "\u2028": "\\u2028", "\u2029": "\\u2029"}

_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def encode_str(text: str) -> bytes:
    """A string as JSON, quotes included."""
    return _as_line(encode_basestring(text))


def encode_json(value: Any) -> bytes:
    """Raises: ValueError, for NaN and Infinity, which JSON has no words for."""
    return _as_line(_ENCODER.encode(value))


def json_response(value: Any, *, request_id: str | None = None) -> Response:
    headers = None if request_id is None else {"x-request-id": request_id}
    return Response(encode_json(value), media_type="application/json", headers=headers)


def _as_line(encoded: str) -> bytes:
    if not encoded.isascii():
        for separator, escaped in _LINE_SEPARATORS.items():
            if separator in encoded:
                encoded = encoded.replace(separator, escaped)
    return encoded.encode()

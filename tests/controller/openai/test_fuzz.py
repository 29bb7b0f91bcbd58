"""Whatever the body is, the answer is 200 or 400 in our shape (404 for another model's name)."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from hypothesis import HealthCheck, given, settings, strategies as st

from controller.openai.body import RequestModel
from controller.openai.schemas_chat import ChatCompletionRequest
from controller.openai.schemas_completions import CompletionRequest
from controller.openai.schemas_tokenize import DetokenizeBody, TokenizeBody
from tests.controller.openai.api import CHAT, COMPLETIONS, MODEL
from tests.fakes.fake_gateway import FakeBackend

BASES: dict[str, dict[str, Any]] = {
    CHAT: {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}]},
    COMPLETIONS: {"model": MODEL, "prompt": "Once"},
    "/tokenize": {"model": MODEL, "prompt": "Once"},
    "/detokenize": {"model": MODEL, "tokens": [1]},
}
MODELS: dict[str, type[RequestModel]] = {
    CHAT: ChatCompletionRequest,
    COMPLETIONS: CompletionRequest,
    "/tokenize": TokenizeBody,
    "/detokenize": DetokenizeBody,
}

scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(0, 30)
    | st.floats()
    | st.floats(0, 2)
    | st.text(max_size=8)
    | st.sampled_from(["text", "user", "assistant", "\ud800", "a" * 70, 10**400])
)
names = st.sampled_from(["role", "content", "type", "text", "name", "include_usage", "0", "1"]) | st.text(max_size=4)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3), max_leaves=8
)


@st.composite
def requests(draw: st.DrawFn) -> tuple[str, bytes]:
    """A right body of one of the endpoints with some fields replaced, or made up, and perhaps damaged as bytes."""
    path = draw(st.sampled_from(sorted(BASES)))
    fields = st.sampled_from(sorted(MODELS[path].model_fields)) | st.text(max_size=5)
    body = BASES[path] | draw(st.dictionaries(fields, values, max_size=3))
    content = json.dumps(body).encode()  # writes NaN, Infinity and lone surrogates as they are refused
    if draw(st.integers(0, 9)) == 0:
        at = draw(st.integers(0, len(content)))
        content = content[:at] + draw(st.binary(max_size=3)) + content[at + draw(st.integers(0, 3)) :]
    return path, content


@pytest.fixture
def asgi(app: FastAPI, backend: FakeBackend) -> httpx.ASGITransport:
    backend.gateway.pause = False
    return httpx.ASGITransport(app, raise_app_exceptions=True)


@given(request=requests())
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_no_body_is_a_server_error(asgi: httpx.ASGITransport, request: tuple[str, bytes]) -> None:
    path, content = request
    async with httpx.AsyncClient(transport=asgi, base_url="http://test") as client:
        reply = await client.post(path, content=content, headers={"content-type": "application/json"})
    assert reply.status_code in (200, 400, 404), (content, reply.text)
    if reply.status_code != 200:
        error = reply.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert isinstance(error["message"], str)
        assert error["param"] is None or isinstance(error["param"], str)
    elif reply.headers["content-type"].startswith("text/event-stream"):
        assert reply.content.endswith(b"data: [DONE]\n\n")
    else:
        reply.json()

"""One streamed request to an OpenAI-compatible server, with the times at which its text arrived."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any, Literal

import aiohttp

Endpoint = Literal["completions", "chat"]
_PATHS = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}


class RequestFailed(Exception):
    """The server refused a request, broke it off, or could not be reached; the message says which.

    Attributes:
        status: HTTP status of a refusal; None otherwise.
    """

    def __init__(self, message: str, *, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


@dataclass(slots=True)
class Answer:
    """A complete answer.

    Attributes:
        start_s: when the request was sent, in seconds of a monotonic clock.
        chunk_s: when each chunk that has text arrived.
        prompt_tokens, completion_tokens: from the server's usage; None where it sends none.
    """

    start_s: float
    chunk_s: list[float] = field(default_factory=list)
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


async def stream_answer(
    session: aiohttp.ClientSession, url: str, endpoint: Endpoint, model: str, prompt: str, fields: dict[str, Any]
) -> Answer:
    """Send one request and read its stream to the end.

    Args:
        url: of the server, without the `/v1`.
        fields: of the body, beside model, prompt (or messages) and stream.

    Raises:
        RequestFailed: anything but a stream that ends with `[DONE]`.
    """
    content = {"prompt": prompt} if endpoint == "completions" else {"messages": [{"role": "user", "content": prompt}]}
    body = {"model": model, "stream": True, **content, **fields}
    answer = Answer(start_s=time.perf_counter())
    try:
        async with session.post(url + _PATHS[endpoint], json=body) as response:
            if response.status != 200:
                raise RequestFailed(
                    f"HTTP {response.status}: {_error_text(await response.text())}", status=response.status
                )
            async for data in _events(response.content):
                if data == "[DONE]":
                    return answer
                _read_chunk(answer, data)
    except TimeoutError as error:
        raise RequestFailed("timed out") from error
    except aiohttp.ClientError as error:
        raise RequestFailed(f"{type(error).__name__}: {error}") from error
    raise RequestFailed("the stream ended without [DONE]")


async def _events(stream: aiohttp.StreamReader) -> AsyncIterator[str]:
    """The payloads of `data:` lines."""
    buffer = b""
    async for received in stream.iter_any():
        *lines, buffer = (buffer + received).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line.removeprefix(b"data:").strip().decode(errors="replace")


def _read_chunk(answer: Answer, data: str) -> None:
    now = time.perf_counter()
    try:
        chunk = json.loads(data)
    except ValueError as error:
        raise RequestFailed(f"a chunk is not JSON: {data[:200]}") from error
    if not isinstance(chunk, dict) or chunk.get("error"):
        raise RequestFailed(f"error in the stream: {_error_text(data)}")
    if any(_text(choice) for choice in chunk.get("choices", ())):
        answer.chunk_s.append(now)
    usage = chunk.get("usage")
    if usage:
        answer.prompt_tokens, answer.completion_tokens = usage.get("prompt_tokens"), usage.get("completion_tokens")


def _text(choice: dict[str, Any]) -> str:
    delta = choice.get("delta") or {}
    text: str | None = choice.get("text") or delta.get("content") or delta.get("reasoning_content")
    return text or ""


def _error_text(content: str) -> str:
    """The message of an OpenAI error object, or the beginning of whatever else it is."""
    try:
        found = json.loads(content)
    except ValueError:
        found = None
    if isinstance(found, dict):
        error = found.get("error", found)
        message = error.get("message") if isinstance(error, dict) else error
        if message:
            return str(message)[:300]
    return content.strip()[:300] or "(empty)"

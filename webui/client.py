"""The public HTTP API as the web UI uses it."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import aiohttp

from webui.sse import SseDecoder

CONNECT_TIMEOUT_S = 5.0
SILENCE_TIMEOUT_S = 600.0
"""A long prompt on a slow machine may take minutes to its first token."""
LIST_TIMEOUT_S = 5.0
MAX_ERROR_CHARS = 300


class ApiError(Exception):
    """Something that the person at the browser should read; the text says what to do."""


@dataclass(frozen=True, slots=True)
class SamplingOptions:
    """How the answer is sampled; a value that means "off" is not sent, so that any OpenAI-compatible server will do."""

    temperature: float = 0.7
    top_p: float = 1.0
    max_tokens: int | None = 512
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()

    def fields(self) -> dict[str, Any]:
        """Fields of the request."""
        fields: dict[str, Any] = {"temperature": self.temperature}
        off = SamplingOptions(max_tokens=None)
        for name in ("top_p", "max_tokens", "top_k", "min_p", "repetition_penalty", "presence_penalty",
                     "frequency_penalty", "seed"):  # fmt: skip
            value = getattr(self, name)
            if value != getattr(off, name):
                fields[name] = value
        if self.stop:
            fields["stop"] = list(self.stop)
        return fields


@dataclass(frozen=True, slots=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class Chunk:
    """News of an answer: text, why it ended, or how many tokens it was."""

    text: str = ""
    finish_reason: str | None = None
    usage: Usage | None = None


class ApiClient:
    """Talks to the controller, or to any server with the OpenAI API. Use within one event loop."""

    def __init__(self, url: str, *, api_key: str | None = None) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self._headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        self._session: aiohttp.ClientSession | None = None

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def list_models(self) -> list[str]:
        """Names of what is served, in the server's order: each model before its adapters.

        Raises:
            ApiError: the server cannot be reached or refuses.
        """
        timeout = aiohttp.ClientTimeout(total=LIST_TIMEOUT_S)
        try:
            async with self._open().get(f"{self.url}/v1/models", headers=self._headers, timeout=timeout) as response:
                body = await response.read()
                if response.status != 200:
                    raise ApiError(_refusal(response.status, body))
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise self._unreachable(error) from error
        try:
            return [str(model["id"]) for model in json.loads(body)["data"]]
        except (ValueError, KeyError, TypeError) as error:
            raise ApiError(f"{self.url} does not answer like an OpenAI server; check --controller.") from error

    async def stream_chat(
        self, model: str, messages: Sequence[Mapping[str, str]], options: SamplingOptions
    ) -> AsyncGenerator[Chunk, None]:
        """The answer to a conversation, as it is made. Closing the generator closes the connection, which cancels the
        request in the engine.

        Raises:
            ApiError: the server cannot be reached, refuses, or breaks off in the middle.
        """
        body = {
            "model": model,
            "messages": list(messages),
            "stream": True,
            "stream_options": {"include_usage": True},
            **options.fields(),
        }
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S, sock_read=SILENCE_TIMEOUT_S)
        started = False
        try:
            async with self._open().post(
                f"{self.url}/v1/chat/completions", json=body, headers=self._headers, timeout=timeout
            ) as response:
                if response.status != 200:
                    raise ApiError(_refusal(response.status, await response.read()))
                started = True
                async with aclosing(_events(response.content)) as events:
                    async for data in events:
                        if data == "[DONE]":
                            return
                        chunk = _chunk(data)
                        if chunk is not None:
                            yield chunk
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            if not started:
                raise self._unreachable(error) from error
            raise ApiError(_BROKEN_OFF) from error
        raise ApiError(_BROKEN_OFF)

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            # Each answer holds a connection, so the number of connections is the number of people who are waiting.
            self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))
        return self._session

    def _unreachable(self, error: BaseException) -> ApiError:
        reason = "it does not answer" if isinstance(error, TimeoutError) else "no connection"
        return ApiError(f"The controller at {self.url} cannot be reached ({reason}). Start it, or try again shortly.")


_BROKEN_OFF = "The connection broke off in the middle of the answer. Press retry to ask again."


async def _events(content: aiohttp.StreamReader) -> AsyncGenerator[str, None]:
    decoder = SseDecoder()
    async for data in content.iter_any():
        for event in decoder.feed(data):
            yield event


def _chunk(data: str) -> Chunk | None:
    """One event of a stream; None: it brings nothing that is shown.

    Raises:
        ApiError: the event is an error, or none of the OpenAI API.
    """
    try:
        event = json.loads(data)
        if event.get("error"):
            raise ApiError(f"{_message(event)} Press retry to ask again.")
        usage = event.get("usage")
        counts = Usage(int(usage["prompt_tokens"]), int(usage["completion_tokens"])) if usage else None
        text, reason = "", None
        for choice in event.get("choices", ()):
            text += choice["delta"].get("content") or ""
            reason = choice.get("finish_reason") or reason
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ApiError("The server's answer is not in the form of the OpenAI API; check --controller.") from error
    return Chunk(text, reason, counts) if text or reason or counts else None


def _refusal(status: int, body: bytes) -> str:
    try:
        return _message(json.loads(body))
    except (ValueError, KeyError, TypeError):
        return f"The server refused with HTTP status {status}. Try again shortly."


def _message(body: Any) -> str:
    """The text of an OpenAI error object: `{"error": {"message": ...}}`."""
    return str(body["error"]["message"])[:MAX_ERROR_CHARS]

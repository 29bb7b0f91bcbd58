"""HTTP from the controller to its workers: one streamed generate request, and plain calls."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TypeVar

import aiohttp
from pydantic import BaseModel, ValidationError

from controller.config import WorkerConfig
from controller.protocol import (
    GENERATE_EVENT,
    WORKER_TOKEN_HEADER,
    DeltaEvent,
    DoneEvent,
    ErrorEvent,
    GenerateRequest,
    PromptEvent,
    WorkerStats,
)
from controller.trusted_networks import TrustedNetworks, TrustedResolver
from controller.workers import Worker
from registry.errors import RootgraftError, UpstreamError, error_from_code

GenerateEvents = PromptEvent | DeltaEvent | DoneEvent | ErrorEvent
Reply = TypeVar("Reply", bound=BaseModel)

MAX_LINE_BYTES = 64 * 1024 * 1024
_JSON = {"content-type": "application/json"}


class WorkerConnectionError(UpstreamError):
    """The connection to a worker was refused, broke, fell silent or carried something that is not the protocol."""


class WorkerClient:
    """One aiohttp session to all workers; made inside of the running event loop."""

    def __init__(self, config: WorkerConfig, trusted: TrustedNetworks) -> None:
        self._config = config
        self._trusted = trusted
        self._session: aiohttp.ClientSession | None = None

    async def start(self) -> None:
        token = self._config.worker_token
        self._session = aiohttp.ClientSession(
            # A connection for each request: cancelling closes it anyhow, and a reused connection that the worker has
            # just closed could not be told from a failed worker.
            connector=aiohttp.TCPConnector(
                limit=0, force_close=True, resolver=TrustedResolver(self._trusted), use_dns_cache=False
            ),
            headers={WORKER_TOKEN_HEADER: token} if token else {},
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            trust_env=False,
        )

    async def stop(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def post(self, worker: Worker, path: str, body: BaseModel) -> aiohttp.ClientResponse:
        """POST and return the response when its headers are there; the caller closes it.

        Raises:
            WorkerConnectionError: no connection, or silence for longer than the worker timeout.
        """
        timeout = aiohttp.ClientTimeout(
            total=None, sock_connect=self._config.connect_timeout_s, sock_read=self._config.worker_timeout_s
        )
        try:
            return await self._started.post(
                worker.url.rstrip("/") + path,
                data=body.model_dump_json().encode(),
                headers=_JSON,
                timeout=timeout,
                allow_redirects=False,
            )
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise _connection_error(worker, error) from error

    async def call(self, worker: Worker, path: str, body: BaseModel, reply: type[Reply]) -> Reply:
        """POST `body` and read one `reply`.

        Raises:
            WorkerConnectionError: as for `post`, or the reply is malformed.
            RootgraftError: the error that the worker answered with.
        """
        response = await self.post(worker, path, body)
        try:
            content = await response.read()
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise _connection_error(worker, error) from error
        finally:
            response.close()
        if response.status != 200:
            raise error_of_response(worker, response.status, content)
        return _parse(worker, reply, content)

    async def stats(self, worker: Worker, *, timeout_s: float) -> WorkerStats:
        """The worker's counts of this moment.

        Raises:
            WorkerConnectionError: no proper answer within `timeout_s` seconds.
        """
        try:
            async with self._started.get(
                worker.url.rstrip("/") + "/internal/stats",
                timeout=aiohttp.ClientTimeout(total=timeout_s),
                allow_redirects=False,
            ) as response:
                content = await response.read()
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise _connection_error(worker, error) from error
        if response.status != 200:
            raise WorkerConnectionError(f"worker {worker.worker_id} answered {response.status} to a stats request")
        return _parse(worker, WorkerStats, content)

    @property
    def _started(self) -> aiohttp.ClientSession:
        assert self._session is not None, "WorkerClient.start() has not run"
        return self._session


class WorkerStream:
    """One generate request on one worker.

    `open()` once, then `next_events()` until a terminal event, then `close()` in any case; close it early to cancel the
    request in the engine. `abort()` may be called by another task at any time: the reader then gets its event.
    """

    def __init__(self, client: WorkerClient, worker: Worker) -> None:
        self.worker = worker
        self._client = client
        self._response: aiohttp.ClientResponse | None = None
        self._opening: asyncio.Timeout | None = None
        self._aborted: ErrorEvent | None = None
        self._lines: deque[bytes] = deque()
        self._partial: list[bytes] = []  # the pieces of a line whose end has not come yet
        self._partial_bytes = 0

    async def open(self, request: GenerateRequest) -> list[GenerateEvents]:
        """Send the request and wait for its first events, which do not begin with an ErrorEvent.

        Raises:
            WorkerConnectionError: the connection failed before the first event.
            RootgraftError: the worker refused the request.
        """
        try:
            async with asyncio.timeout(None) as self._opening:
                self._response = await self._client.post(self.worker, "/internal/generate", request)
                if self._response.status != 200:
                    content = await self._response.read()
                    raise error_of_response(self.worker, self._response.status, content)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            if self._aborted is not None:
                raise error_of_event(self._aborted) from None
            raise _connection_error(self.worker, error) from error
        finally:
            self._opening = None
        events = await self.next_events()
        first = events[0]
        if first.kind == "error":
            raise error_of_event(first)
        return events

    async def next_events(self) -> list[GenerateEvents]:
        """The events that have come since the last call, at least one.

        Raises:
            WorkerConnectionError: the connection failed before a terminal event.
        """
        while True:
            events = self._received()
            if events:
                return events
            if self._aborted is not None:
                return [self._aborted]
            await self._read_lines()

    def abort(self, event: ErrorEvent) -> None:
        """End the stream from outside: the reader gets `event` after what it has received already."""
        self._aborted = event
        if self._opening is not None:
            self._opening.reschedule(0.0)
        if self._response is not None:
            self._response.close()

    def close(self) -> None:
        if self._response is not None:
            self._response.close()

    def _received(self) -> list[GenerateEvents]:
        """The events of `_lines` up to a terminal one or a malformed one, which is raised when it comes first."""
        lines = self._lines
        events: list[GenerateEvents] = []
        while lines:
            line = lines.popleft()
            if not line:  # it only says that the worker is alive
                continue
            try:
                event = GENERATE_EVENT.validate_json(line)
            except ValidationError as error:
                if not events:
                    raise _malformed(self.worker, error) from None
                lines.appendleft(line)
                break
            events.append(event)
            if event.kind == "done" or event.kind == "error":
                break
        return events

    async def _read_lines(self) -> None:
        """Wait for bytes and move what they complete to `_lines`."""
        assert self._response is not None
        try:
            chunk = await self._response.content.readany()
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            if self._aborted is not None:
                return
            raise _connection_error(self.worker, error) from error
        if not chunk and self._aborted is None:
            raise WorkerConnectionError(f"worker {self.worker.worker_id} broke off; send the request again")
        first, newline, rest = chunk.partition(b"\n")
        self._partial.append(first)
        self._partial_bytes += len(first)
        if self._partial_bytes > MAX_LINE_BYTES:
            raise WorkerConnectionError(f"worker {self.worker.worker_id} sent an event of over {MAX_LINE_BYTES} bytes")
        if newline:
            *whole, last = rest.split(b"\n")
            self._lines.append(b"".join(self._partial))
            self._lines.extend(whole)
            self._partial = [last]
            self._partial_bytes = len(last)


def error_of_event(event: ErrorEvent) -> RootgraftError:
    return error_from_code(event.code, event.message, param=event.param, retry_after_s=event.retry_after_s)


def error_of_response(worker: Worker, status: int, content: bytes) -> RootgraftError:
    """The error in a worker's answer with a status other than 200."""
    try:
        return error_of_event(ErrorEvent.model_validate_json(content))
    except ValidationError:
        return WorkerConnectionError(f"worker {worker.worker_id} answered {status}; see its log")


def _parse(worker: Worker, kind: type[Reply], content: bytes) -> Reply:
    try:
        return kind.model_validate_json(content)
    except ValidationError as error:
        raise _malformed(worker, error) from None


def _malformed(worker: Worker, error: ValidationError) -> WorkerConnectionError:
    return WorkerConnectionError(
        f"worker {worker.worker_id} sent a malformed {error.title}: {error.errors()[0]['msg']}; "
        "install the same release of rootgraft on controller and worker"
    )


def _connection_error(worker: Worker, error: Exception) -> WorkerConnectionError:
    if isinstance(error, TimeoutError):
        reason = "did not answer in time"
    elif isinstance(error, aiohttp.ClientConnectorError):
        reason = "cannot be reached"
    else:
        reason = "broke off"
    return WorkerConnectionError(f"worker {worker.worker_id} {reason}; send the request again")

"""The way of a request to a worker and of its events back.

    Gateway.stream ──► resolve the name ──► policy picks a replica ──► WorkerStream.open ──► first event ──► yield …
                                               ▲                            │ refused, broken, overloaded
                                               └── another replica, each once, at most max_attempts

Before the first event of a request nothing has been promised to the client, so another replica may be tried and errors
are raised; after it, a failure ends the stream with one ErrorEvent.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from controller.protocol import (
    DetokenizeReply,
    DetokenizeRequest,
    ErrorEvent,
    GenerateRequest,
    ServedModel,
    TokenizeReply,
    TokenizeRequest,
)
from controller.routing import RoutingPolicy
from controller.worker_client import GenerateEvents, WorkerClient, WorkerConnectionError, WorkerStream
from controller.workers import Worker, WorkerTable
from registry.errors import (
    InvalidRequestError,
    ModelNotFoundError,
    OverloadedError,
    RateLimitError,
    RequestTooLargeError,
    RootgraftError,
    UpstreamError,
)

logger = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R", TokenizeReply, DetokenizeReply)
ResolveName = Callable[[str], Awaitable[str | None]]


@dataclass(frozen=True, slots=True)
class ServedModelInfo:
    """A model that live workers serve, merged over its replicas.

    Attributes:
        created: Unix time, seconds, at which this name was first served.
        max_model_len: tokens; the least of the replicas'.
        chat: whether every replica has a chat template.
    """

    name: str
    family: str
    max_model_len: int
    chat: bool
    dtype: str
    digest: str | None
    created: int
    num_workers: int


class Gateway:
    """Args:
    resolve: the served name that a public name stands for (an alias, a version); None when the catalog has none.
    max_attempts: replicas that are tried for one request before its first event.
    retry_after_s: what clients are told to wait when nobody can take a request: the time for a heartbeat or two.
    wall_clock: Unix time, seconds.
    """

    def __init__(
        self,
        workers: WorkerTable,
        client: WorkerClient,
        policy: RoutingPolicy,
        resolve: ResolveName,
        *,
        max_attempts: int,
        retry_after_s: float,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._workers = workers
        self._client = client
        self._policy = policy
        self._resolve = resolve
        self._max_attempts = max_attempts
        self._retry_after_s = retry_after_s
        self._wall_clock = wall_clock
        self._open_streams: set[WorkerStream] = set()
        self._created: dict[str, int] = {}
        self._stopping = False

    async def stream(
        self, request: GenerateRequest, *, affinity: str | None = None
    ) -> AsyncGenerator[list[GenerateEvents], None]:
        """Generate on one of the model's workers.

        Args:
            request: `request.model` is a public name; the worker gets the served name that it resolves to.
            affinity: equal for requests that are likely to share a prefix; they go to the same replica where its load
                allows.

        Yields:
            What came together: PromptEvent, DeltaEvents, then exactly one terminal event, DoneEvent or ErrorEvent.
            Closing the generator early closes the connection to the worker, which cancels the request in the engine.

        Raises:
            ModelNotFoundError: no such model.
            OverloadedError: no worker can take the request now; `retry_after_s` is set.
            RateLimitError: all replicas that were tried are full.
            InvalidRequestError: the worker refused the request.
            UpstreamError: all replicas that were tried failed.
        """
        model = await self._served_name(request.model)
        if model != request.model:
            request = request.model_copy(update={"model": model})

        async def open_stream(worker: Worker) -> tuple[WorkerStream, list[GenerateEvents]]:
            stream = WorkerStream(self._client, worker)
            self._open_streams.add(stream)
            try:
                return stream, await stream.open(request)
            except BaseException:
                self._close(stream)
                raise

        with contextlib.ExitStack() as in_flight:
            stream, events = await self._try_replicas(model, affinity, open_stream, in_flight)
            try:
                while True:
                    yield events
                    if events[-1].kind in ("done", "error"):
                        return
                    try:
                        events = await stream.next_events()
                    except WorkerConnectionError as error:
                        self._failed(stream.worker, error)
                        events = [ErrorEvent(code=error.code, message=error.message)]
            finally:
                self._close(stream)

    async def tokenize(self, request: TokenizeRequest) -> TokenizeReply:
        """Tokenize on one of the model's workers. Raises: as `stream`."""
        return await self._call("/internal/tokenize", request, TokenizeReply)

    async def detokenize(self, request: DetokenizeRequest) -> DetokenizeReply:
        """Detokenize on one of the model's workers. Raises: as `stream`."""
        return await self._call("/internal/detokenize", request, DetokenizeReply)

    def models(self) -> list[ServedModelInfo]:
        """The models that live workers serve now, by name."""
        return [self._info(name, replicas) for name, replicas in sorted(self._workers.models().items())]

    def note_created(self, name: str, created: int | None) -> None:
        """Remember that `name` is a model that is served, and since when (Unix time, seconds; None: since now)."""
        if created is not None:
            self._created[name] = created
        else:
            self._created.setdefault(name, int(self._wall_clock()))

    def worker_gone(self, worker: Worker, reason: str) -> None:
        """End the open streams of a worker that is lost; those without an event yet go to another replica."""
        event = ErrorEvent(
            code=UpstreamError.code, message=f"worker {worker.worker_id} {reason}; send the request again"
        )
        self._abort([stream for stream in self._open_streams if stream.worker.worker_id == worker.worker_id], event)

    def stop_streams(self) -> None:
        """End every open stream with an error event and open no other: the controller stops."""
        self._stopping = True
        event = ErrorEvent(
            code=OverloadedError.code,
            message="the controller is stopping; send the request again",
            retry_after_s=self._retry_after_s,
        )
        self._abort(list(self._open_streams), event)

    # -------------------------------------------------------------------------------------------- replicas

    async def _call(self, path: str, request: TokenizeRequest | DetokenizeRequest, reply: type[R]) -> R:
        """One request and one reply, from any replica."""
        model = await self._served_name(request.model)
        body = request.model_copy(update={"model": model})
        with contextlib.ExitStack() as in_flight:
            return await self._try_replicas(
                model, None, lambda worker: self._client.call(worker, path, body, reply), in_flight
            )

    async def _try_replicas(
        self,
        model: str,
        affinity: str | None,
        attempt: Callable[[Worker], Awaitable[T]],
        in_flight: contextlib.ExitStack,
    ) -> T:
        """Run `attempt` on one replica after the other until one succeeds; it stays counted until `in_flight` ends."""
        tried: set[str] = set()
        errors: list[RootgraftError] = []
        while len(tried) < self._max_attempts and not self._stopping:
            candidates = [worker for worker in self._workers.serving(model) if worker.worker_id not in tried]
            if not candidates:
                break
            worker = self._policy(candidates, affinity)
            tried.add(worker.worker_id)
            with contextlib.ExitStack() as attempted:
                attempted.enter_context(self._workers.acquire(worker))
                try:
                    result = await attempt(worker)
                except (InvalidRequestError, RequestTooLargeError):
                    raise
                except RootgraftError as error:
                    self._failed(worker, error)
                    errors.append(error)
                else:
                    in_flight.push(attempted.pop_all())
                    return result
        raise self._nobody(model, errors)

    def _failed(self, worker: Worker, error: RootgraftError) -> None:
        logger.warning("worker %s failed a request: %s (%r)", worker.worker_id, error.message, error.__cause__)
        if isinstance(error, WorkerConnectionError):
            self._workers.mark_failed(worker)

    def _nobody(self, model: str, errors: Sequence[RootgraftError]) -> RootgraftError:
        """What the client is told when every replica that was tried failed, or there was none to try."""
        for kind in (RateLimitError, OverloadedError):
            found = {error.retry_after_s or self._retry_after_s: error for error in errors if isinstance(error, kind)}
            if found:
                soonest_s = min(found)
                return kind(found[soonest_s].message, retry_after_s=soonest_s)
        if errors:
            return UpstreamError(f"{len(errors)} of the workers of {model!r} failed: {errors[-1].message}")
        return OverloadedError(
            f"no live worker serves {model!r} at the moment; try again in a few seconds",
            retry_after_s=self._retry_after_s,
        )

    # ----------------------------------------------------------------------------------------------- names

    async def _served_name(self, name: str) -> str:
        if self._workers.knows(name) or name in self._created:
            return name
        resolved = await self._resolve(name)
        if resolved is None:
            known = ", ".join(sorted(self._workers.models())) or "none"
            # The name comes from a client: escaped and cut, so that it cannot forge a log line.
            raise ModelNotFoundError(
                f"the model {name[:80]!a} does not exist; models served now: {known}", param="model"
            )
        return resolved

    def _info(self, name: str, replicas: Sequence[tuple[Worker, ServedModel]]) -> ServedModelInfo:
        models = [model for _, model in replicas]
        return ServedModelInfo(
            name=name,
            family=models[0].family,
            max_model_len=min(model.max_model_len for model in models),
            chat=all(model.chat for model in models),
            dtype=models[0].dtype,
            digest=models[0].digest,
            created=self._created.setdefault(name, int(self._wall_clock())),
            num_workers=len(models),
        )

    # --------------------------------------------------------------------------------------------- streams

    def _close(self, stream: WorkerStream) -> None:
        self._open_streams.discard(stream)
        stream.close()

    def _abort(self, streams: Sequence[WorkerStream], event: ErrorEvent) -> None:
        for stream in streams:
            stream.abort(event)

"""The way of a request to a worker and of its events back.

    Gateway.stream ──► resolve the names ──► policy picks a replica ──► WorkerStream.open ──► first event ──► yield …
                                               ▲                            │ refused, broken, overloaded
                                               └── another replica, each once, at most max_attempts

Before the first event of a request nothing has been promised to the client, so another replica may be tried and errors
are raised; after it, a failure ends the stream with one ErrorEvent.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from typing import TypeVar

from controller.file_errors import hide_files, hide_files_of_event
from controller.fingerprint import fingerprint
from controller.protocol import (
    DetokenizeReply,
    DetokenizeRequest,
    ErrorEvent,
    GenerateRequest,
    LoraWeight,
    TokenizeReply,
    TokenizeRequest,
)
from controller.routing import RoutingPolicy, VariantRouting
from controller.served_names import ServedModelInfo, ServedNames
from controller.variants.directory import VariantDirectory
from controller.worker_client import GenerateEvents, WorkerClient, WorkerConnectionError, WorkerStream
from controller.workers import Worker, WorkerTable
from registry.errors import (
    InsufficientMemoryError,
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

Bring = Callable[[Worker, Sequence[str]], Awaitable[None]]

BRING_S = 10.0  # how long a request waits for workers that have just started to read its variants


class Gateway:
    """Args:
    names: what public names stand for.
    variants: which worker can be asked for which variant.
    bring: lets a worker read variants that it should have, see VariantReconciler.bring.
    max_attempts: replicas that are tried for one request before its first event.
    retry_after_s: what clients are told to wait when nobody can take a request: the time for a heartbeat or two.
    """

    def __init__(
        self,
        workers: WorkerTable,
        client: WorkerClient,
        policy: RoutingPolicy,
        names: ServedNames,
        variants: VariantDirectory,
        bring: Bring,
        *,
        max_attempts: int,
        retry_after_s: float,
    ) -> None:
        self._workers = workers
        self._client = client
        self._policy = policy
        self._variant_routing = VariantRouting(policy)
        self._names = names
        self._variants = variants
        self._bring = bring
        self._max_attempts = max_attempts
        self._retry_after_s = retry_after_s
        self._open_streams: set[WorkerStream] = set()
        self._stopping = False

    async def stream(
        self, request: GenerateRequest, *, affinity: str | None = None
    ) -> AsyncGenerator[list[GenerateEvents], None]:
        """Generate on one of the model's workers.

        Args:
            request: `request.model` and the names in `request.loras` are public names; the worker gets what they
                resolve to. A model that is a variant stands for its base model with that variant.
            affinity: equal for requests that are likely to share a prefix; they go to the same replica where its load
                allows.

        Yields:
            What came together: PromptEvent, DeltaEvents, then exactly one terminal event, DoneEvent or ErrorEvent.
            Closing the generator early closes the connection to the worker, which cancels the request in the engine.

        Raises:
            ModelNotFoundError: no such model or variant.
            OverloadedError: no worker can take the request now; `retry_after_s` is set.
            RateLimitError: all replicas that were tried are full.
            InvalidRequestError: `loras` are not variants of the model, or the worker refused the request.
            UpstreamError: all replicas that were tried failed.
        """
        request = await self._names.resolve_request(request)

        async def open_stream(worker: Worker) -> tuple[WorkerStream, list[GenerateEvents]]:
            stream = WorkerStream(self._client, worker)
            self._open_streams.add(stream)
            try:
                return stream, await stream.open(request)
            except BaseException:
                self._close(stream)
                raise

        with contextlib.ExitStack() as in_flight:
            names = [lora.name for lora in request.loras]
            stream, events = await self._try_replicas(request.model, names, affinity, open_stream, in_flight)
            if (first := events[0]).kind == "prompt":
                shown = fingerprint(stream.worker, request.model, request.loras)
                events[0] = first.model_copy(update={"fingerprint": shown})
            try:
                while True:
                    if (last := events[-1]).kind == "error":
                        events = [*events[:-1], hide_files_of_event(last, names)]
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
        """The models and variants that live workers serve now; each model before its variants."""
        return self._names.models()

    def note_created(self, name: str, created: int | None) -> None:
        """Remember that `name` is a model that is served, and since when (Unix time, seconds; None: since now)."""
        self._names.note_created(name, created)

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
        served = await self._names.resolve(request.model)
        model = served.parent or served.name
        names = [] if served.parent is None else [served.name]
        body = request.model_copy(update={"model": model, "loras": [LoraWeight(name=name) for name in names]})
        with contextlib.ExitStack() as in_flight:
            return await self._try_replicas(
                model, names, None, lambda worker: self._client.call(worker, path, body, reply), in_flight
            )

    async def _try_replicas(
        self,
        model: str,
        variants: Sequence[str],
        affinity: str | None,
        attempt: Callable[[Worker], Awaitable[T]],
        in_flight: contextlib.ExitStack,
    ) -> T:
        """Run `attempt` on one replica after the other until one succeeds; it stays counted until `in_flight` ends."""
        tried: set[str] = set()
        asked: set[str] = set()  # to read the variants
        bring_until = asyncio.get_running_loop().time() + BRING_S
        errors: list[RootgraftError] = []
        while len(tried) < self._max_attempts and not self._stopping:
            serving = self._workers.serving(model)
            able = [worker for worker in serving if self._variants.can_serve(worker, variants)]
            if not able and (lacking := [worker for worker in serving if worker.worker_id not in asked]):
                worker = self._policy(lacking, "\0".join(sorted(variants)))
                asked.add(worker.worker_id)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout_at(bring_until):
                        await self._bring(worker, variants)
                continue
            if serving and not able:
                errors = errors or [self._not_loaded(serving, variants)]
            candidates = [worker for worker in able if worker.worker_id not in tried]
            if not candidates:
                break
            if variants:
                worker = self._variant_routing(candidates, variants, affinity)
            else:
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
                    errors.append(hide_files(error, variants))
                else:
                    in_flight.push(attempted.pop_all())
                    return result
        raise self._nobody(model, variants, errors)

    def _failed(self, worker: Worker, error: RootgraftError) -> None:
        logger.warning("worker %s failed a request: %s (%r)", worker.worker_id, error.message, error.__cause__)
        if isinstance(error, WorkerConnectionError):
            self._workers.mark_failed(worker)

    def _nobody(self, model: str, variants: Sequence[str], errors: Sequence[RootgraftError]) -> RootgraftError:
        """What the client is told when every replica that was tried failed, or there was none to try."""
        for kind in (RateLimitError, OverloadedError):
            found = {error.retry_after_s or self._retry_after_s: error for error in errors if isinstance(error, kind)}
            if found:
                soonest_s = min(found)
                return kind(found[soonest_s].message, retry_after_s=soonest_s)
        if variants and errors and all(isinstance(error, ModelNotFoundError) for error in errors):
            if self._variants.wanted.keys() >= set(variants):  # the worker reads it again
                return OverloadedError(errors[-1].message, retry_after_s=self._retry_after_s)
            return errors[-1]  # it was removed while the request was on its way
        if variants and errors and all(isinstance(error, InsufficientMemoryError) for error in errors):
            return OverloadedError(errors[-1].message, retry_after_s=self._retry_after_s)  # until others are unpinned
        if errors:
            return UpstreamError(f"{len(errors)} of the workers of {model!r} failed: {errors[-1].message}")
        return OverloadedError(
            f"no live worker serves {model!r} at the moment; try again in a few seconds",
            retry_after_s=self._retry_after_s,
        )

    def _not_loaded(self, serving: Sequence[Worker], variants: Sequence[str]) -> OverloadedError:
        """Why none of the workers that serve the model has all `variants`."""
        for name in variants:
            on = [self._variants.on(worker, name) for worker in serving]
            if not any(variant.usable for variant in on):
                reason = "its workers have not read it yet"
                if any(variant.error is not None for variant in on):
                    reason = "its workers could not load it; an operator finds the reason in GET /admin/variants"
                break
        else:
            name, reason = ", ".join(variants), "no worker has all of them"
        return OverloadedError(f"{name} is registered but not loaded: {reason}", retry_after_s=self._retry_after_s)

    # --------------------------------------------------------------------------------------------- streams

    def _close(self, stream: WorkerStream) -> None:
        self._open_streams.discard(stream)
        stream.close()

    def _abort(self, streams: Sequence[WorkerStream], event: ErrorEvent) -> None:
        for stream in streams:
            stream.abort(event)

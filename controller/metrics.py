"""What the controller measures, in Prometheus' text format.

Requests are measured here, by one RequestObserver each. The workers' own counts are fetched when /metrics is read (see
`controller.scrape`), so that freed KV blocks are seen at once and not at the next heartbeat.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.registry import Collector

from registry.errors import RootgraftError

_TTFT_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 60.0, 120.0)
_INTER_TOKEN_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
_LATENCY_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 60.0, 120.0, 300.0, 900.0)

MAX_MODEL_LABELS = 256  # values of the label `model`: models, aliases and variants, as clients name them
OTHER_MODELS = "_other"  # what the names beyond that count under; no name begins with an underscore

CLIENT_CLOSED = 499  # the status under which a request counts whose client went away first


class Metrics:
    """The metrics of one controller, in a registry of its own.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self._models: set[str] = set()
        self._registry = CollectorRegistry()
        registry = self._registry
        self.requests = Counter(
            "rootgraft_requests", "Requests that ended.", ("route", "model", "status"), registry=registry
        )
        self.rejected = Counter(
            "rootgraft_requests_rejected", "Requests refused before their route saw them (key, size, rate).",
            ("status",), registry=registry,
        )  # fmt: skip
        self.in_flight = Gauge("rootgraft_requests_in_flight", "Requests in progress.", ("route",), registry=registry)
        self.time_to_first_token = Histogram(
            "rootgraft_time_to_first_token_seconds", "From the request to the first token of a choice.",
            ("model",), buckets=_TTFT_BUCKETS, registry=registry,
        )  # fmt: skip
        self.inter_token = Histogram(
            "rootgraft_inter_token_seconds", "Between two tokens of a choice; mean over those that came together.",
            ("model",), buckets=_INTER_TOKEN_BUCKETS, registry=registry,
        )  # fmt: skip
        self.request_latency = Histogram(
            "rootgraft_request_seconds", "From the request to its end.",
            ("route", "model"), buckets=_LATENCY_BUCKETS, registry=registry,
        )  # fmt: skip
        self.prompt_tokens = Counter(
            "rootgraft_prompt_tokens", "Prompt tokens of requests that ended well.", ("model",), registry=registry
        )
        self.completion_tokens = Counter(
            "rootgraft_completion_tokens", "Tokens sampled for clients.", ("model",), registry=registry
        )

    def start_request(self, route: str) -> RequestObserver:
        """Begin to observe a request; `route` is the path of its route, not what the client wrote."""
        return RequestObserver(self, route)

    def model_label(self, model: str) -> str:
        """The value of the label `model`: there may be thousands of variants, and each has dozens of time series."""
        if model not in self._models and len(self._models) >= MAX_MODEL_LABELS:
            return OTHER_MODELS
        self._models.add(model)
        return model

    def reject(self, status: int) -> None:
        self.rejected.labels(str(status)).inc()

    def render(self, *collectors: Collector) -> bytes:
        """The metrics in Prometheus' text format, followed by those of `collectors`."""
        registry = CollectorRegistry()
        for collector in collectors:
            registry.register(collector)
        return generate_latest(self._registry) + generate_latest(registry)


class RequestObserver:
    """Observes one request from its start to its end. The route uses it so:

        with metrics.start_request("/v1/chat/completions") as observer:
            observer.set_model(name)                       # only names that exist: each one becomes a label
            async for events in gateway.stream(...):
                for event in events:
                    if event.kind == "delta":
                        observer.delta(event.index, event.num_tokens)
                    elif event.kind == "done":
                        observer.done(event.num_prompt_tokens)
            observer.finish(200)

    For a stream, enter it where the request starts and leave it where the stream ends, or call `finish` in a `finally`;
    `finish` counts once, the first status wins. Leaving the context without `finish` counts as 500 on an exception of
    ours, as the error's own status if it has one, as 499 on cancellation or GeneratorExit (the client went away), else
    as 200.
    """

    __slots__ = (
        "_clock", "_inter_token", "_last_token_at", "_metrics", "_model", "_num_tokens", "_route", "_started_at",
        "_status",
    )  # fmt: skip

    def __init__(self, metrics: Metrics, route: str) -> None:
        self._metrics = metrics
        self._clock = metrics.clock
        self._route = route
        self._model = ""
        self._inter_token = metrics.inter_token.labels("")
        self._last_token_at: dict[int, float] = {}  # choice index → clock time
        self._num_tokens = 0
        self._status: int | None = None
        self._started_at = self._clock()
        metrics.in_flight.labels(route).inc()

    def set_model(self, model: str) -> None:
        """Name the model or variant for the labels. Call it with names that exist only.

        A request with `loras` counts under its base model; what each adapter of it did, the workers count.
        """
        self._model = self._metrics.model_label(model)
        self._inter_token = self._metrics.inter_token.labels(self._model)

    def delta(self, index: int, num_tokens: int) -> None:
        """`num_tokens` tokens of choice `index` have arrived."""
        if num_tokens <= 0:
            return
        now = self._clock()
        last = self._last_token_at.get(index)
        if last is not None:
            self._inter_token.observe((now - last) / num_tokens)
        elif not self._last_token_at:
            self._metrics.time_to_first_token.labels(self._model).observe(now - self._started_at)
        self._last_token_at[index] = now
        self._num_tokens += num_tokens

    def done(self, num_prompt_tokens: int) -> None:
        """The request was answered in full."""
        self._metrics.prompt_tokens.labels(self._model).inc(num_prompt_tokens)

    def finish(self, status: int) -> None:
        """Count the request under its final status; a stream that broke off counts under that of its error."""
        if self._status is not None:
            return
        self._status = status
        metrics = self._metrics
        metrics.in_flight.labels(self._route).dec()
        metrics.requests.labels(self._route, self._model, str(status)).inc()
        metrics.request_latency.labels(self._route, self._model).observe(self._clock() - self._started_at)
        if self._num_tokens:
            metrics.completion_tokens.labels(self._model).inc(self._num_tokens)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self.finish(200)
        elif isinstance(error, RootgraftError):
            self.finish(error.status)
        elif isinstance(error, Exception):
            self.finish(500)
        else:
            self.finish(CLIENT_CLOSED)  # CancelledError, GeneratorExit

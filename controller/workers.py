"""The table of model workers: who is there, what they serve, and how busy they are.

Pure: no HTTP, no asyncio, an injected clock. Everything in it is rebuilt from the workers' registrations, so a
restarted controller needs nothing but the next heartbeats.

    register ──► ready ──mark_failed──► suspect ──heartbeat──► ready
                   │  └─ draining (said by the worker; not routed to, its open requests finish)
                   └──── no heartbeat for `missed_heartbeats` intervals, or leave ──► gone
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

from controller.protocol import (
    PROTOCOL_VERSION,
    RegisterRequest,
    ServedModel,
    VariantReport,
    VariantStatus,
    WorkerStats,
)
from controller.reported_variants import ReportedVariants
from registry.errors import InvalidRequestError

WorkerState = Literal["ready", "draining", "suspect"]

SETTLE_S = 3.0
"""How long a worker's answer to a change of a variant outweighs its heartbeats: those may have been on their way, and
in the middle of a long step a worker repeats what it said before."""


@dataclass(slots=True, eq=False, weakref_slot=True)
class Worker:
    """One registered worker. Identity is the object: a worker that registers again gets a new one.

    Attributes:
        last_heartbeat: clock time, seconds.
        stats: as of `last_heartbeat`.
        suspect: a request to it failed at the connection since `last_heartbeat`.
        num_in_flight: requests that this controller has open on it now.
        num_in_flight_at_heartbeat: the same when `stats` arrived; those are already counted in `stats`.
        reported: the variants as of `last_heartbeat`.
        variants: by name, as reported or as in the worker's answer to a change since then.
        answers: to changes of variants, by name, and when they came; None: it has none of that name any more.
    """

    worker_id: str
    url: str
    models: tuple[ServedModel, ...]
    stats: WorkerStats
    last_heartbeat: float
    suspect: bool = False
    num_in_flight: int = 0
    num_in_flight_at_heartbeat: int = 0
    reported: ReportedVariants = field(default_factory=ReportedVariants)
    variants: dict[str, VariantStatus] = field(default_factory=dict)
    answers: dict[str, tuple[float, VariantStatus | None]] = field(default_factory=dict)

    @property
    def state(self) -> WorkerState:
        if self.suspect:
            return "suspect"
        return "draining" if self.stats.draining else "ready"

    @property
    def num_requests(self) -> int:
        """Requests on the worker: what it reported, corrected by what this controller began and ended since then.

        Never less than what this controller itself has open there.
        """
        reported = self.stats.num_running + self.stats.num_waiting
        return max(self.num_in_flight, reported + self.num_in_flight - self.num_in_flight_at_heartbeat)

    def serves(self, model: str) -> bool:
        return any(served.name == model for served in self.models)


class WorkerTable:
    """The workers that are not gone, whether they can take a request or not.

    Args:
        clock: monotonic seconds.
        expiry_s: a worker without a heartbeat for longer than this is gone.
    """

    def __init__(self, *, clock: Callable[[], float], expiry_s: float) -> None:
        self._clock = clock
        self._expiry_s = expiry_s
        self._workers: dict[str, Worker] = {}

    def __len__(self) -> int:
        return len(self._live())

    @property
    def num_ready(self) -> int:
        """Workers that can take a request now."""
        return sum(worker.state == "ready" for worker in self._live())

    def __iter__(self) -> Iterator[Worker]:
        return iter(self._live())

    def get(self, worker_id: str) -> Worker | None:
        return self._workers.get(worker_id)

    def register(self, request: RegisterRequest) -> tuple[Worker, list[Worker]]:
        """Add a worker; one with the same id or the same URL is replaced, for it is the same worker started again.

        Returns:
            The worker, and those that it replaced.

        Raises:
            InvalidRequestError: as `check`.
        """
        self.check(request)
        replaced = [worker for worker in self._workers.values() if _is_same(worker, request)]
        for worker in replaced:
            del self._workers[worker.worker_id]
        added = Worker(request.worker_id, request.url, tuple(request.models), request.stats, self._clock())
        added.reported.take(request.variants)
        added.variants = dict(added.reported.by_name)
        self._workers[added.worker_id] = added
        return added, replaced

    def check(self, request: RegisterRequest) -> None:
        """Whether a worker may register. Replicas of a name are interchangeable, so their weights must be the same.

        Raises:
            InvalidRequestError: another protocol version, a name that live workers serve with other weights, or one
                that would be a model's and a variant's.
        """
        check_protocol_version(request.protocol_version)
        self._check_variant_names(request)
        digests = {model.name: model.digest for model in request.models}
        for worker in self._workers.values():
            for model in worker.models:
                if not _is_same(worker, request) and digests.get(model.name, model.digest) != model.digest:
                    raise InvalidRequestError(
                        f"{model.name} is served by {worker.worker_id} with other weights ({model.digest}, here "
                        f"{digests[model.name]}); give this one another --model-name, or stop the others first",
                        param="models",
                    )

    def _check_variant_names(self, request: RegisterRequest) -> None:
        others = [worker for worker in self._workers.values() if not _is_same(worker, request)]
        models = {model.name for model in request.models}
        variants = {status.name for status in request.variants.variants}
        clash = models & variants
        for worker in others:
            clash |= models & worker.variants.keys() | variants & {model.name for model in worker.models}
        if clash:
            raise InvalidRequestError(
                f"{min(clash)} would be the name of a model and of a variant; give one of them another name",
                param="variants",
            )

    def heartbeat(self, worker_id: str, stats: WorkerStats, variants: VariantReport) -> Worker | None:
        """Take a worker's sign of life; None when it is unknown and must register again."""
        worker = self._workers.get(worker_id)
        if worker is None:
            return None
        worker.stats = stats
        worker.last_heartbeat = self._clock()
        worker.answers = {
            name: answer for name, answer in worker.answers.items() if worker.last_heartbeat - answer[0] <= SETTLE_S
        }
        worker.reported.take(variants)
        worker.variants = dict(worker.reported.by_name)
        for name, (_, answer) in worker.answers.items():
            _correct(worker, name, answer)
        worker.suspect = False
        worker.num_in_flight_at_heartbeat = worker.num_in_flight
        return worker

    def note_variant(self, worker: Worker, name: str, answer: VariantStatus | None) -> None:
        """Take what a worker said of a variant when it had changed it; None: it has none of that name any more."""
        worker.answers[name] = (self._clock(), answer)
        worker.variants.pop(name, None)
        if answer is not None:
            worker.variants[name] = answer

    def leave(self, worker_id: str) -> Worker | None:
        """Remove a worker; None when it was not there."""
        return self._workers.pop(worker_id, None)

    def expire(self) -> list[Worker]:
        """Remove and return the workers whose heartbeat has been missing for too long."""
        now = self._clock()
        gone = [worker for worker in self._workers.values() if now - worker.last_heartbeat > self._expiry_s]
        for worker in gone:
            del self._workers[worker.worker_id]
        return gone

    def excuse(self, absence_s: float) -> None:
        """This controller was stopped for so long: heartbeats from that time may still be waiting to be read."""
        for worker in self._workers.values():
            worker.last_heartbeat += absence_s

    def stop_expiry(self) -> None:
        """Let nobody expire from now on: this controller stops listening, so silence says nothing about a worker."""
        self._expiry_s = math.inf

    def mark_failed(self, worker: Worker) -> None:
        """Route nothing more to `worker` until its next heartbeat: a connection to it was refused or broke."""
        worker.suspect = True

    def heartbeat_age_s(self, worker: Worker) -> float:
        return self._clock() - worker.last_heartbeat

    def serving(self, model: str) -> list[Worker]:
        """The workers that serve `model` and can take a request now."""
        return [worker for worker in self._live() if worker.state == "ready" and worker.serves(model)]

    def knows(self, model: str) -> bool:
        """Whether any worker, able to take a request or not, serves `model`."""
        return any(worker.serves(model) for worker in self._workers.values())

    def models(self) -> dict[str, list[tuple[Worker, ServedModel]]]:
        """The models of live workers by name, each with its replicas; draining workers do not count."""
        found: dict[str, list[tuple[Worker, ServedModel]]] = {}
        for worker in self._live():
            if worker.state == "ready":
                for model in worker.models:
                    found.setdefault(model.name, []).append((worker, model))
        return found

    @contextmanager
    def acquire(self, worker: Worker) -> Iterator[Worker]:
        """Count one request in flight on `worker` as long as the context lasts."""
        worker.num_in_flight += 1
        try:
            yield worker
        finally:
            worker.num_in_flight -= 1

    def _live(self) -> Sequence[Worker]:
        now = self._clock()
        return [worker for worker in self._workers.values() if now - worker.last_heartbeat <= self._expiry_s]


def check_protocol_version(version: int) -> None:
    """Raise InvalidRequestError unless `version` is the one that this controller speaks."""
    if version != PROTOCOL_VERSION:
        raise InvalidRequestError(
            f"the worker speaks protocol version {version}, this controller speaks {PROTOCOL_VERSION}; "
            "install the same release of rootgraft on both",
            param="protocol_version",
        )


def _correct(worker: Worker, name: str, answer: VariantStatus | None) -> None:
    """Put an answer in the place of a report that contradicts it."""
    reported = worker.variants.get(name)
    if answer is None:
        worker.variants.pop(name, None)
    elif reported is None or (reported.digest, reported.pinned) != (answer.digest, answer.pinned):
        worker.variants[name] = answer


def _is_same(worker: Worker, request: RegisterRequest) -> bool:
    return worker.worker_id == request.worker_id or worker.url == request.url

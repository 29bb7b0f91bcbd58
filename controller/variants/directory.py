"""What is known about variants now: which there are, and which worker can be asked for which. Pure, but for the log."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from controller.protocol import VariantKind, VariantStatus
from controller.routing import TIERS
from controller.variants.failures import Failures
from controller.workers import Worker, WorkerTable
from registry.catalog import VariantRecord
from registry.errors import ModelNotFoundError, RootgraftError, UpstreamError
from registry.published_files import PublishedFiles

logger = logging.getLogger(__name__)

_USABLE = frozenset(TIERS)


@dataclass(frozen=True, slots=True)
class OnWorker:
    """A variant on one worker.

    Attributes:
        status: None: the worker has none of that name.
        usable: requests for it can be sent there.
        error: why it is not usable, or what the last change of it came to.
        retry_in_s: until the change that failed is tried again.
    """

    worker: Worker
    status: VariantStatus | None
    usable: bool
    error: RootgraftError | None
    retry_in_s: float | None


class VariantDirectory:
    """The catalog's variants as they were read last, beside what the workers report.

    Attributes:
        wanted: by name.
        version: grows with every change of `wanted` that this controller made itself, so that what was read from the
            catalog before it can be told from what was read after it.
    """

    def __init__(self, workers: WorkerTable, failures: Failures) -> None:
        self._workers = workers
        self._failures = failures
        self._decided: dict[str, str] = {}  # by name: the digest that is served, where the catalog knows none
        self.wanted: Mapping[str, VariantRecord] = {}
        self.version = 0

    def refresh(self, records: Iterable[VariantRecord], version: int) -> bool:
        """Take over what was read from the catalog while `version` was current; False: it is outdated, and ignored."""
        if version != self.version:
            return False
        self.wanted = {record.name: record for record in records}
        return True

    def put(self, record: VariantRecord) -> None:
        self.version += 1
        self.wanted = {**self.wanted, record.name: record}

    def drop(self, name: str) -> None:
        self.version += 1
        self.wanted = {known: record for known, record in self.wanted.items() if known != name}

    def wanted_of(self, worker: Worker) -> dict[str, VariantRecord]:
        """What `worker` should have, by name."""
        models = {model.name for model in worker.models}
        return {name: record for name, record in self.wanted.items() if record.parent in models}

    def parent_of(self, name: str) -> str | None:
        """The base model of a variant; None when there is none of that name."""
        if (record := self.wanted.get(name)) is not None:
            return record.parent
        return next((status.parent for _, status in self._reported(name)), None)

    def kind_of(self, name: str) -> VariantKind | None:
        """What its files are: by their names where those are known, else as workers say; None: none has read them."""
        record = self.wanted.get(name)
        if record is not None and record.files is not None:
            return PublishedFiles(record.files).kind
        return next((status.kind for _, status in self._reported(name) if status.kind is not None), None)

    def names(self) -> set[str]:
        """All variants that are wanted or that workers have."""
        reported = {
            name for worker in self._workers for name, status in worker.variants.items() if status.state != "draining"
        }
        return reported | self.wanted.keys()

    def on(self, worker: Worker, name: str) -> OnWorker:
        status = worker.variants.get(name)
        failure = self._failures.of(worker, name)
        error: RootgraftError | None = None
        if status is not None and (other := self.other_files(worker, status)) is not None:
            error = other
        elif failure is not None:
            error = failure.error
        elif status is not None and status.error is not None:
            error = UpstreamError(status.error)
        retry_in_s = None if failure is None else self._failures.retry_in_s(failure)
        usable = worker.state == "ready" and self._is_usable(worker, name)
        return OnWorker(worker, status, usable, error, retry_in_s)

    def other_files(self, worker: Worker, status: VariantStatus) -> RootgraftError | None:
        """What is wrong where a worker has other files than those that are served under the variant's name."""
        expected = self._expected_digest(status.name)
        if None in (status.digest, expected) or status.digest == expected:
            return None
        remedy = f"restore them, or replace {status.name} by loading it again"
        if status.from_command_line:
            remedy = "start all workers with the same files under one name"
        return UpstreamError(
            f"worker {worker.worker_id} has other files under {status.path} ({status.digest}) than those that are "
            f"served as {status.name} ({expected}), and gets no requests for it; {remedy}"
        )

    def on_workers(self, name: str) -> list[OnWorker]:
        """The variant on every worker that serves its base model."""
        parent = self.parent_of(name)
        return [self.on(worker, name) for worker in self._workers if parent is not None and worker.serves(parent)]

    def can_serve(self, worker: Worker, names: Iterable[str]) -> bool:
        return all(self._is_usable(worker, name) for name in names)

    def _is_usable(self, worker: Worker, name: str) -> bool:
        status = worker.variants.get(name)
        if status is None or status.state not in _USABLE:
            return False
        return status.digest is None or self._expected_digest(name) in (None, status.digest)

    def _expected_digest(self, name: str) -> str | None:
        """The files that replicas must have, to answer alike: the catalog's; where it knows none, those of the first
        worker that had the name, for as long as any worker has them."""
        record = self.wanted.get(name)
        if record is not None and record.digest is not None:
            return record.digest
        reported = [status.digest for _, status in self._reported(name) if status.digest is not None]
        decided = self._decided.get(name)
        if decided in reported:
            return decided
        if not reported:
            self._decided.pop(name, None)
            return None
        if decided is not None:
            logger.warning("%s is served with other files from now on: no worker has %s any more", name, decided)
        self._decided[name] = reported[0]
        return reported[0]

    def _reported(self, name: str) -> Iterator[tuple[Worker, VariantStatus]]:
        for worker in self._workers:
            status = worker.variants.get(name)
            if status is not None and status.state != "draining":
                yield worker, status


def unknown_variant(name: str) -> ModelNotFoundError:
    # The name comes from a client: escaped and cut, so that it cannot forge a log line.
    return ModelNotFoundError(
        f"the variant {name[:200]!a} does not exist; GET /admin/variants lists those that do", param="name"
    )

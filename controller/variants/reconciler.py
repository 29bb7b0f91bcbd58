"""Mends the difference between the variants that the catalog wants and those that the workers have.

Each registration and each heartbeat nudges it about one worker. What it does then runs in a task of that worker, so
that neither heartbeats nor other workers wait for it. A change that fails is shown, and tried again after a pause.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from weakref import WeakKeyDictionary, WeakValueDictionary

from controller.protocol import AddVariantRequest, NamedVariantRequest, VariantStatus
from controller.ttl_cache import TTLCache
from controller.variants.directory import VariantDirectory
from controller.variants.failures import Failures
from controller.variants.mending import Step, next_step, same_files, to_mend
from controller.worker_client import WorkerClient
from controller.workers import Worker, WorkerTable
from registry.catalog import Catalog, VariantRecord
from registry.errors import CheckpointError, ModelNotFoundError, RootgraftError

logger = logging.getLogger(__name__)

REFRESH_S = 1.0  # how old what was read from the catalog may be when a worker is compared with it
_ACTOR = "controller"


class VariantReconciler:
    """Args:
    clock: monotonic seconds.
    """

    def __init__(
        self,
        catalog: Catalog,
        workers: WorkerTable,
        directory: VariantDirectory,
        failures: Failures,
        client: WorkerClient,
        *,
        clock: Callable[[], float],
    ) -> None:
        self._catalog = catalog
        self._workers = workers
        self._directory = directory
        self._failures = failures
        self._client = client
        self._revision: int | None = None  # of the catalog, as the directory has it
        self._read: TTLCache[None, None] = TTLCache(ttl_s=REFRESH_S, max_entries=1, clock=clock)
        self._tasks: dict[str, asyncio.Task[None]] = {}  # worker id → its task
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        # Variants of command lines: the digests of other files that were warned of, by name.
        self._warned: WeakKeyDictionary[Worker, dict[str, str | None]] = WeakKeyDictionary()
        self._stopping = False

    def nudge(self, worker: Worker) -> None:
        """Compare `worker` with the catalog, unless that is going on already: the next heartbeat comes soon."""
        if not self._stopping and worker.worker_id not in self._tasks:
            task = asyncio.create_task(self._mend(worker), name=f"variants-{worker.worker_id}")
            self._tasks[worker.worker_id] = task
            task.add_done_callback(lambda _: self._tasks.pop(worker.worker_id, None))

    async def stop(self) -> None:
        self._stopping = True
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    @asynccontextmanager
    async def changing(self, name: str) -> AsyncIterator[None]:
        """While it lasts nobody else of this controller changes the variant, in the catalog or on a worker."""
        lock = self._locks.setdefault(name, asyncio.Lock())
        async with lock:
            yield

    async def bring(self, worker: Worker, names: Iterable[str]) -> None:
        """Let `worker` read the variants now, before the others that it lacks: a request waits for them.

        Returns when it has them, or cannot have them now; what has failed there is left to its pause.
        """
        try:
            await self.refresh()
            for name in names:
                if not self._directory.can_serve(worker, [name]):
                    await self._mend_one(worker, name)
        except RootgraftError as error:
            logger.warning("worker %s could not be asked for variants: %s", worker.worker_id, error.message)

    async def refresh(self) -> None:
        """Read the catalog if it has changed; asks at most every REFRESH_S. Raises: InternalError."""

        def read_changes() -> tuple[int, list[VariantRecord] | None]:
            revision = self._catalog.revision()  # first: what changes in between is read again
            return revision, None if revision == self._revision else self._catalog.list_variants()

        async def read() -> None:
            version = self._directory.version
            revision, records = await asyncio.to_thread(read_changes)
            before = self._directory.wanted
            if records is not None and self._directory.refresh(records, version):
                self._revision = revision
                for record in records:
                    known = before.get(record.name)
                    if known is not None and known.updated_at != record.updated_at:
                        self._failures.forget_all(record.name)

        await self._read.get(None, read)

    async def take(self, worker: Worker, name: str, step: Step, wanted: VariantRecord | None) -> VariantStatus | None:
        """Tell a worker to take one step, and note what came of it. The caller is `changing` the variant.

        Returns:
            The variant as the worker has it now; None: no longer.

        Raises:
            RootgraftError: the worker's own error, or it cannot be reached.
        """
        path = f"/internal/variants/{step}"
        body: AddVariantRequest | NamedVariantRequest = NamedVariantRequest(name=name)
        if step == "add":
            assert wanted is not None
            body = AddVariantRequest(
                name=name,
                parent=wanted.parent,
                path=wanted.path,
                pinned=wanted.pinned,
                files=None if wanted.files is None else dict(wanted.files),
            )
        try:
            status = await self._client.call(worker, path, body, VariantStatus)
        except RootgraftError as error:
            if step != "remove" or not isinstance(error, ModelNotFoundError):
                self._failures.note(worker, name, error)
                raise
            status = None  # it had none
        if step == "remove":
            self._workers.note_variant(worker, name, None)
            self._failures.forget(worker, name)
            return None
        assert status is not None
        self._workers.note_variant(worker, name, status)
        if wanted is not None and not same_files(wanted, status):
            self.note_other_files(worker, status, wanted.digest)
        else:
            self._failures.forget(worker, name)
        return status

    def note_other_files(self, worker: Worker, status: VariantStatus, wanted: str | None) -> None:
        """A worker's path holds other files than those with the digest `wanted`."""
        error = CheckpointError(f"the files at {status.path} have the digest {status.digest}, but {wanted} is wanted")
        if self._failures.of(worker, status.name) is None:
            logger.warning("worker %s, variant %s: %s", worker.worker_id, status.name, error.message)
        self._failures.note(worker, status.name, error)

    async def identify(self, record: VariantRecord, digest: str, *, overrule: bool = False) -> VariantRecord:
        """Note in the catalog which files a variant's path holds. Args and Raises: as Catalog.set_variant_digest."""
        known = await asyncio.to_thread(
            self._catalog.set_variant_digest, record, digest, actor=_ACTOR, overrule=overrule
        )
        self._directory.put(known)
        return known

    async def _mend(self, worker: Worker) -> None:
        try:
            await self.refresh()
            wanted = self._directory.wanted_of(worker)
            self._warn_of_other_files(worker)
            self._failures.keep_only(worker, {*wanted, *worker.variants})
            for name in to_mend(wanted, worker.variants):
                if self._workers.get(worker.worker_id) is not worker or worker.state != "ready":
                    return
                await self._mend_one(worker, name)
        except RootgraftError as error:
            logger.warning("the variants of worker %s stay as they are for now: %s", worker.worker_id, error.message)
        except Exception:
            logger.exception("the variants of worker %s stay as they are for now", worker.worker_id)

    def _warn_of_other_files(self, worker: Worker) -> None:
        """Nobody mends what a worker's command line says, so that it is said, once."""
        warned = self._warned.setdefault(worker, {})
        for status in worker.variants.values():
            if not status.from_command_line or status.state == "draining":
                continue
            error = self._directory.other_files(worker, status)
            if error is None:
                warned.pop(status.name, None)
            elif warned.get(status.name) != status.digest:
                warned[status.name] = status.digest
                logger.warning(error.message)

    async def _mend_one(self, worker: Worker, name: str) -> None:
        async with self.changing(name):
            # Looked at again: somebody may have changed it before the lock was free.
            wanted = self._directory.wanted_of(worker).get(name)
            step = next_step(wanted, worker.variants.get(name))
            if step is None or not self._failures.is_due(worker, name):
                return
            try:
                status = await self.take(worker, name, step, wanted)
            except RootgraftError as error:
                logger.warning("worker %s could not %s variant %s: %s", worker.worker_id, step, name, error.message)
                return
            logger.info("worker %s: %s variant %s", worker.worker_id, step, name)
            if wanted is not None and wanted.digest is None and status is not None and status.digest is not None:
                await self.identify(wanted, status.digest)

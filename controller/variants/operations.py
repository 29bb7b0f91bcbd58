"""What operators do with variants: each change goes into the catalog and to all workers of the base model at once."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Literal

from controller.protocol import NamedVariantRequest, VariantStatus
from controller.variants.directory import OnWorker, VariantDirectory, unknown_variant
from controller.variants.failures import Failures
from controller.variants.mending import Step
from controller.variants.reconciler import VariantReconciler
from controller.worker_client import WorkerClient
from controller.workers import Worker, WorkerTable
from registry.catalog import Catalog, VariantRecord
from registry.errors import ClientError, InvalidRequestError, ModelNotFoundError, OverloadedError, RootgraftError


class VariantOperations:
    """Every operation returns the variant on each worker as it is then; a worker that failed says so there.

    `actor` is who asked for it, see registry.catalog.Catalog.
    """

    def __init__(
        self,
        catalog: Catalog,
        workers: WorkerTable,
        directory: VariantDirectory,
        failures: Failures,
        reconciler: VariantReconciler,
        client: WorkerClient,
    ) -> None:
        self._catalog = catalog
        self._workers = workers
        self._directory = directory
        self._failures = failures
        self._reconciler = reconciler
        self._client = client

    async def add(
        self, name: str, *, parent: str | None, path: str, pinned: bool, replace: bool, actor: str
    ) -> list[OnWorker]:
        """Want a variant, and let the workers read it now. What no worker can read is not kept.

        Args:
            parent: the base model; None: the only one that is served.

        Raises:
            InvalidRequestError: the name is taken, `parent` is needed and not given, or the worker's own error.
            ModelNotFoundError: no worker serves `parent`.
            OverloadedError: no worker, or none of `parent`, can be asked now.
        """
        await self._reconciler.refresh()
        parent = self._base_model(parent)
        self._check_name_is_free(name)
        async with self._reconciler.changing(name):
            workers = self._ready(parent)
            before = await asyncio.to_thread(self._find, name)
            if before is not None and before.parent != parent:
                raise InvalidRequestError(
                    f"{name} is a variant of {before.parent}; remove it there first", param="base_model_name"
                )
            record = await asyncio.to_thread(
                self._catalog.add_variant,
                name, parent=parent, path=path, pinned=pinned, replace=replace, actor=actor,
            )  # fmt: skip
            self._directory.put(record)
            self._failures.forget_all(name)
            statuses, errors = await _everywhere(
                workers, lambda worker: self._reconciler.take(worker, name, "add", record)
            )
            if not statuses:
                await self._take_back(record, before, actor)
                self._failures.forget_all(name)
                raise _told_first(errors)
            await self._identify(record, statuses)
        return self._directory.on_workers(name)

    async def roll_out(self, record: VariantRecord) -> None:
        """Let all workers read at once what the catalog wants already; what fails shows in the directory."""
        async with self._reconciler.changing(record.name):
            self._directory.put(record)
            self._failures.forget_all(record.name)
            statuses, _ = await _everywhere(
                self._workers.serving(record.parent),
                lambda worker: self._reconciler.take(worker, record.name, "add", record),
            )
            await self._identify(record, statuses)

    async def pin(self, name: str, pinned: bool, *, actor: str) -> list[OnWorker]:
        """Want a variant to be kept ready on all workers, or no longer. What every worker refuses is not kept.

        Raises:
            ModelNotFoundError: there is none of that name.
            InvalidRequestError: workers have it from their command line only, or the worker's own error.
        """
        await self._check_wanted(name)
        async with self._reconciler.changing(name):
            before = await asyncio.to_thread(self._catalog.get_variant, name)
            record = await asyncio.to_thread(self._catalog.pin_variant, name, pinned, actor=actor)
            self._directory.put(record)
            step: Step = "pin" if pinned else "unpin"
            having = self._having(name)
            done, errors = await _everywhere(having, lambda worker: self._reconciler.take(worker, name, step, record))
            if having and not done:
                restored = await asyncio.to_thread(self._catalog.pin_variant, name, before.pinned, actor=actor)
                self._directory.put(restored)
                self._failures.forget_all(name)
                raise _told_first(errors)
        return self._directory.on_workers(name)

    async def remove(self, name: str, *, actor: str) -> list[OnWorker]:
        """Want a variant no longer: no new request gets it, and workers forget it when those that use it have ended.

        Workers that cannot be told now are told later.

        Raises:
            ModelNotFoundError: there is none of that name.
            InvalidRequestError: an alias points to it, or workers have it from their command line only.
        """
        await self._check_wanted(name)
        async with self._reconciler.changing(name):
            having = self._having(name)
            await asyncio.to_thread(self._catalog.remove_variant, name, actor=actor)
            self._directory.drop(name)
            self._failures.forget_all(name)
            await _everywhere(having, lambda worker: self._reconciler.take(worker, name, "remove", None))
            return [self._directory.on(worker, name) for worker in having]

    async def move(self, name: str, verb: Literal["activate", "evict"]) -> list[OnWorker]:
        """Make a variant ready to be used at once, or free its memory, on all workers, for now.

        Raises:
            ModelNotFoundError: there is none of that name.
            RootgraftError: no worker could do it; the first one's reason.
        """
        await self._reconciler.refresh()
        if self._directory.parent_of(name) is None:
            raise unknown_variant(name)
        workers = self._having(name)
        if not workers:
            raise OverloadedError(f"no worker that is ready has {name}", retry_after_s=2.0)

        async def tell(worker: Worker) -> VariantStatus:
            path = f"/internal/variants/{verb}"
            status = await self._client.call(worker, path, NamedVariantRequest(name=name), VariantStatus)
            self._workers.note_variant(worker, name, status)
            return status

        async with self._reconciler.changing(name):
            statuses, errors = await _everywhere(workers, tell)
        if not statuses:
            raise _told_first(errors)
        failed = dict(errors)
        return [
            OnWorker(on.worker, on.status, on.usable, failed.get(on.worker, on.error), on.retry_in_s)
            for on in self._directory.on_workers(name)
        ]

    # ------------------------------------------------------------------------------------------------ checks

    def _base_model(self, parent: str | None) -> str:
        served = sorted(self._workers.models())
        if not served:
            raise OverloadedError("no worker is ready, so nothing can be loaded now; try again", retry_after_s=2.0)
        if parent is None:
            if len(served) == 1:
                return served[0]
            raise InvalidRequestError(
                f"{len(served)} base models are served ({', '.join(served)}); say which one the adapter belongs to in "
                "base_model_name",
                param="base_model_name",
            )
        if not self._workers.knows(parent):
            raise ModelNotFoundError(
                f"the base model {parent[:80]!a} is not served; models served now: {', '.join(served)}",
                param="base_model_name",
            )
        return parent

    def _check_name_is_free(self, name: str) -> None:
        if self._workers.knows(name):
            raise InvalidRequestError(f"{name} is the name of a model; give the adapter another one", param="name")
        for worker in self._workers:
            status = worker.variants.get(name)
            if status is not None and status.from_command_line:
                raise InvalidRequestError(
                    f"worker {worker.worker_id} was started with --lora or --delta {name}=…; choose another name",
                    param="name",
                )

    async def _check_wanted(self, name: str) -> None:
        if await asyncio.to_thread(self._find, name) is not None:
            return
        if self._directory.parent_of(name) is None:
            raise unknown_variant(name)
        raise InvalidRequestError(
            f"workers were started with --lora or --delta {name}=…; what their command lines say is changed there",
            param="name",
        )

    def _find(self, name: str) -> VariantRecord | None:
        try:
            return self._catalog.get_variant(name)
        except ModelNotFoundError:
            return None

    def _ready(self, parent: str) -> list[Worker]:
        workers = self._workers.serving(parent)
        if not workers:
            raise OverloadedError(f"no worker of {parent} can be asked now; try again", retry_after_s=2.0)
        return workers

    def _having(self, name: str) -> list[Worker]:
        return [worker for worker in self._workers if worker.state == "ready" and name in worker.variants]

    # ------------------------------------------------------------------------------------------- the catalog

    async def _take_back(self, record: VariantRecord, before: VariantRecord | None, actor: str) -> None:
        """No worker could read it: want what was wanted before."""
        if before is None:
            await asyncio.to_thread(self._catalog.remove_variant, record.name, actor=actor)
            self._directory.drop(record.name)
        else:
            self._directory.put(await asyncio.to_thread(self._catalog.restore_variant, before, actor=actor))

    async def _identify(self, record: VariantRecord, statuses: Sequence[tuple[Worker, VariantStatus | None]]) -> None:
        """The first worker's files are those that are wanted."""
        read = [(worker, status) for worker, status in statuses if status is not None and status.digest is not None]
        if not read:
            return
        known = await self._reconciler.identify(record, read[0][1].digest or "", overrule=True)
        for worker, status in read:
            if status.digest != known.digest:
                self._reconciler.note_other_files(worker, status, known.digest)


async def _everywhere(
    workers: Sequence[Worker], call: Callable[[Worker], Awaitable[VariantStatus | None]]
) -> tuple[list[tuple[Worker, VariantStatus | None]], list[tuple[Worker, RootgraftError]]]:
    """Call all workers at once. -> what came of it, and the errors, each in the workers' order"""

    async def attempt(worker: Worker) -> VariantStatus | RootgraftError | None:
        try:
            return await call(worker)
        except RootgraftError as error:
            return error

    results = list(zip(workers, await asyncio.gather(*map(attempt, workers)), strict=True))
    done = [(worker, result) for worker, result in results if not isinstance(result, RootgraftError)]
    return done, [(worker, result) for worker, result in results if isinstance(result, RootgraftError)]


def _told_first(errors: Sequence[tuple[Worker, RootgraftError]]) -> RootgraftError:
    """The error that helps most: what the caller can mend before what only an operator can."""
    return next((error for _, error in errors if isinstance(error, ClientError)), errors[0][1])

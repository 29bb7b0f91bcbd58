"""What operators and publishers do with releases, and what the controller does by itself: roll out, abort canaries."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from controller.publishing.blobs import require_store
from controller.publishing.canaries import CanaryJudge
from controller.publishing.release_directory import ReleaseDirectory
from controller.publishing.rollout import judge
from controller.variants.directory import OnWorker, VariantDirectory
from controller.variants.operations import VariantOperations
from controller.workers import WorkerTable
from registry.catalog import Alias, AuditEntry, Canary, Catalog, Release, VersionRecord
from registry.errors import InvalidRequestError, ModelNotFoundError, ProbeFailedError, RootgraftError
from registry.names import ModelName
from registry.published_files import PublishedFiles
from registry.store import Store

logger = logging.getLogger(__name__)

WATCH_S = 0.25  # between two looks at what is rolled out, and at the catalog
_ACTOR = "controller"
_ABANDONED_S = 86400.0  # after which an upload without a version is given up

T = TypeVar("T")


class ReleaseOperations:
    """Changes of the catalog are seen by requests when the call returns; those of others within WATCH_S.

    `actor` is who asked for it, see registry.catalog.Catalog.

    Args:
        store: None: nothing can be published here.
    """

    def __init__(
        self,
        catalog: Catalog,
        store: Store | None,
        workers: WorkerTable,
        directory: ReleaseDirectory,
        variants: VariantDirectory,
        variant_operations: VariantOperations,
        canaries: CanaryJudge,
    ) -> None:
        self._catalog = catalog
        self._store = store
        self._workers = workers
        self._directory = directory
        self._variants = variants
        self._variant_operations = variant_operations
        self._canaries = canaries
        self._revision: int | None = None  # of the catalog, as the directory has it
        self._rolling: dict[str, asyncio.Task[None]] = {}  # version's name → its roll-out
        self._reading = asyncio.Lock()

    # ---------------------------------------------------------------------------------------------- versions

    async def add_version(
        self,
        release: str,
        *,
        parent: str | None,
        base_digest: str | None,
        files: Mapping[str, str],
        quality: Mapping[str, Any] | None,
        actor: str,
    ) -> VersionRecord:
        """Make a version of files that are in the store, and begin to roll it out.

        Args:
            parent: its base model; None: the one with `base_digest`, or the only one that is served.

        Raises:
            InvalidRequestError: a file is not in the store, a name is taken, or the base model cannot be told.
            ModelNotFoundError: no such base model is served.
        """
        published = PublishedFiles(files)
        await asyncio.to_thread(_check_stored, require_store(self._store), published)
        parent = await self._base_model(parent, base_digest)
        if self._workers.knows(release):
            raise InvalidRequestError(f"{release} is the name of a model; give the release another one", param="name")
        version = await self._change(
            self._catalog.add_version, release, parent=parent, files=published, quality=quality, actor=actor
        )
        if version.state == "rolling_out":
            await self._roll_out(version)
        return version

    async def get_version(self, name: ModelName) -> tuple[VersionRecord, list[OnWorker]]:
        """A version, and what each worker of its base model has of it. Raises: ModelNotFoundError."""
        version = await asyncio.to_thread(self._catalog.get_version, name)
        return version, self._variants.on_workers(version.name)

    async def remove_version(self, name: ModelName, *, actor: str) -> VersionRecord:
        """Requests that use it end first; files of no other version go. Raises: as Catalog.remove_version."""
        version = await self._change(self._catalog.remove_version, name, actor=actor)
        self._variants.drop(version.name)
        if self._store is not None:
            await asyncio.to_thread(_delete_unused, self._store, self._catalog)
        return version

    async def list_releases(self) -> list[Release]:
        return await asyncio.to_thread(self._catalog.list_releases)

    async def get_release(self, name: str) -> Release:
        """Raises: ModelNotFoundError."""
        return await asyncio.to_thread(self._catalog.get_release, name)

    # ----------------------------------------------------------------------------------------------- aliases

    async def set_alias(self, name: str, alias: str, version: int, *, actor: str) -> Alias:
        """Raises: as Catalog.set_alias."""
        target = ModelName(name, version=version)
        return await self._change(self._catalog.set_alias, name, alias, target, actor=actor)

    async def rollback_alias(self, name: str, alias: str, *, actor: str) -> Alias:
        """Raises: as Catalog.rollback_alias."""
        return await self._change(self._catalog.rollback_alias, name, alias, actor=actor)

    async def set_canary(self, name: str, alias: str, canary: Canary | None, *, actor: str) -> Alias:
        """Raises: as Catalog.set_canary."""
        changed = await self._change(self._catalog.set_canary, name, alias, canary, actor=actor)
        self._canaries.begin(name, alias)
        return changed

    async def set_shadow(self, name: str, alias: str, version: int | None, *, actor: str) -> Alias:
        """Raises: as Catalog.set_shadow."""
        return await self._change(self._catalog.set_shadow, name, alias, version, actor=actor)

    async def remove_alias(self, name: str, alias: str, *, actor: str) -> None:
        """Raises: ModelNotFoundError."""
        await self._change(self._catalog.remove_alias, name, alias, actor=actor)

    async def alias_history(self, name: str, alias: str) -> list[AuditEntry]:
        """The newest first."""
        return await asyncio.to_thread(self._catalog.alias_history, name, alias)

    # -------------------------------------------------------------------------------------- what goes on by itself

    async def watch(self) -> None:
        """Follow the catalog, roll-outs and canaries until cancelled."""
        while True:
            try:
                await self.check()
            except RootgraftError as error:
                logger.warning("releases stay as they are for now: %s", error.message)
            except Exception:  # a bug: the next look at the catalog may go well
                logger.exception("releases stay as they are for now")
            await asyncio.sleep(WATCH_S)

    async def stop(self) -> None:
        """Leave roll-outs to the next controller."""
        tasks = list(self._rolling.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def check(self) -> None:
        """Read the catalog if it has changed, and judge versions that are rolled out, and canaries."""
        await self._refresh()
        for version in list(self._directory.versions()):
            if version.state == "rolling_out":
                await self._judge_version(version)
        for alias in list(self._directory.aliases()):
            if alias.canary is not None and alias.canary.weight > 0.0:
                await self._judge_canary(alias)

    async def _judge_version(self, version: VersionRecord) -> None:
        state, error = judge(self._variants.on_workers(version.name))
        if state == "rolling_out":
            return
        name = ModelName(version.release, version=version.number)
        try:
            await self._change(self._catalog.set_version_state, name, state, error=error, actor=_ACTOR)
        except ModelNotFoundError:
            return  # removed meanwhile
        if state == "failed":
            self._variants.drop(version.name)
        logger.info("%s is %s%s", version.name, state, "" if error is None else f": {error}")

    async def _judge_canary(self, alias: Alias) -> None:
        assert alias.canary is not None
        name = f"{alias.name}@v{alias.canary.version}"
        reason = self._canaries.reason_to_abort(alias)
        for on in self._variants.on_workers(name):
            if isinstance(on.error, ProbeFailedError):
                reason = f"worker {on.worker.worker_id}: {on.error.message}"
        if reason is not None:
            logger.warning("the canary %s of %s@%s is aborted: %s", name, alias.name, alias.alias, reason)
            await self._change(
                self._catalog.abort_canary, alias.name, alias.alias, alias.canary.version, reason=reason, actor=_ACTOR
            )

    async def _roll_out(self, version: VersionRecord) -> None:
        """Let the workers read it now, instead of with their next heartbeats; the caller does not wait."""
        if version.name in self._rolling:
            return
        record = await asyncio.to_thread(self._catalog.get_variant, version.name)

        async def roll_out() -> None:
            try:
                await self._variant_operations.roll_out(record)
                await self.check()
            except RootgraftError as error:
                logger.warning("%s is not rolled out yet: %s", version.name, error.message)

        task = asyncio.create_task(roll_out(), name=f"roll-out-{version.name}")
        self._rolling[version.name] = task
        task.add_done_callback(lambda _: self._rolling.pop(version.name, None))

    # ------------------------------------------------------------------------------------------------ catalog

    async def _change(self, change: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Change the catalog, and let requests see it."""
        changed = await asyncio.to_thread(change, *args, **kwargs)
        await self._refresh()
        return changed

    async def _refresh(self) -> None:
        def read() -> tuple[int, list[Release] | None]:
            revision = self._catalog.revision()  # first: what changes in between is read again
            return revision, None if revision == self._revision else self._catalog.list_releases()

        async with self._reading:  # else an older answer could replace a newer one
            revision, releases = await asyncio.to_thread(read)
            if releases is not None:
                self._directory.refresh(releases)
                self._revision = revision

    async def _base_model(self, parent: str | None, base_digest: str | None) -> str:
        """The name of a model that is served, or of one that the catalog knows: its workers may just be coming back."""
        served = {name: replicas[0][1].digest for name, replicas in self._workers.models().items()}
        known = {model.name: model.digest for model in await asyncio.to_thread(self._catalog.list_models)} | served
        shown = ", ".join(f"{name} ({digest})" for name, digest in sorted(served.items())) or "none"
        if parent is not None:
            if parent not in known and not self._workers.knows(parent):
                raise ModelNotFoundError(
                    f"the base model {parent[:80]!a} is not served; models served now: {shown}", param="parent"
                )
            digest = known.get(parent)
            if None not in (digest, base_digest) and digest != base_digest:
                raise InvalidRequestError(
                    f"this was made for the base {base_digest}, but {parent} is {digest}; publish it for its own base",
                    param="parent",
                )
            return parent
        found = [name for name, digest in served.items() if base_digest in (None, digest)]
        if not found and base_digest is not None:
            found = [name for name, digest in known.items() if base_digest == digest]
        if len(found) != 1:
            which = "with the digest " + base_digest if base_digest is not None else "that it could belong to"
            raise InvalidRequestError(
                f"{len(found)} models {which} are served; say the base model's name in parent. Served now: {shown}",
                param="parent",
            )
        return found[0]


def _delete_unused(store: Store, catalog: Catalog) -> None:
    """Delete the files of no version, but for those that may be of one that somebody is about to make."""
    store.remove_abandoned(_ABANDONED_S)
    used = catalog.published_digests()
    for blob in list(store.blobs()):
        if blob.digest not in used and time.time() - blob.path.stat().st_mtime > _ABANDONED_S:
            store.delete(blob.digest)


def _check_stored(store: Store, files: PublishedFiles) -> None:
    """Raises InvalidRequestError when the store lacks one of the files."""
    for name, digest in files.digests.items():
        if digest not in store:
            raise InvalidRequestError(f"{name} ({digest}) is not in the store; upload it first", param="files")

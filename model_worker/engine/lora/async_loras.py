"""The adapters of an engine that runs in a thread of its own, for the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from model_worker.engine.lora.lora_manager import LoraManager
from model_worker.engine.lora.variant_status import VariantStatus
from registry.errors import RootgraftError


class HasLoras(Protocol):
    """An engine; `loras` raises an UnsupportedModelError where it cannot have any."""

    @property
    def loras(self) -> LoraManager: ...


@dataclass(frozen=True, slots=True)
class LoraCall:
    """A command to the engine's thread.

    Attributes:
        operation: of the manager.
        answer: takes what came of it; called in the engine's thread.
    """

    operation: Callable[[LoraManager], Future[Any]]
    answer: Callable[[Any], None]

    def carry_out(self, engine: HasLoras) -> None:
        try:
            reply = self.operation(engine.loras)
        except RootgraftError as error:
            self.answer(error)
        else:
            reply.add_done_callback(lambda done: self.answer(done.exception() or done.result()))


class AsyncLoras:
    """Adds, removes, pins and evicts LoRA adapters while requests run; see LoraManager.

    All calls may be made at any time from the event loop; each ends with the state that resulted, or raises

        ModelNotFoundError       there is no such adapter
        CheckpointError          its files are wrong, or not for this base model
        UnsupportedModelError    this engine cannot compute it
        InsufficientMemoryError  there is no room for it
        InvalidRequestError      it is needed, or was removed in the meantime
        InternalError            the engine has died, or was stopped
    """

    def __init__(self, send: Callable[[LoraCall], None]) -> None:
        self._send = send
        self._open: set[asyncio.Future[Any]] = set()
        self._ended_with: RootgraftError | None = None

    async def add(
        self, name: str, path: Path, *, parent: str = "", pinned: bool = False, from_command_line: bool = False
    ) -> VariantStatus:
        """Serve the adapter in the directory `path` under `name`, once it is read and found right.

        Other files under the same name replace the old ones; the same files only set `pinned`.
        """
        return await self._status(
            lambda loras: loras.add(name, path, parent=parent, pinned=pinned, from_command_line=from_command_line)
        )

    async def remove(self, name: str) -> VariantStatus:
        """Serve it no more; its requests go on, and with the last one its memory is free."""
        return await self._status(lambda loras: loras.remove(name))

    async def activate(self, name: str) -> VariantStatus:
        """Bring it where requests can run with it; done when it is there."""
        return await self._status(lambda loras: loras.activate(name))

    async def deactivate(self, name: str) -> VariantStatus:
        """Keep it in host memory only."""
        return await self._status(lambda loras: loras.deactivate(name))

    async def evict(self, name: str) -> VariantStatus:
        """Keep its files only."""
        return await self._status(lambda loras: loras.evict(name))

    async def pin(self, name: str) -> VariantStatus:
        """Make it active, soon, and keep it so."""
        return await self._status(lambda loras: loras.pin(name))

    async def unpin(self, name: str) -> VariantStatus:
        return await self._status(lambda loras: loras.unpin(name))

    async def list(self) -> list[VariantStatus]:
        """Of all that have a name, or had one and still have requests. These come first."""
        statuses: list[VariantStatus] = await self._call(_statuses)
        return statuses

    def fail_all(self, error: RootgraftError) -> None:
        """The engine's thread has ended: nothing that is open, or comes, is carried out any more."""
        self._ended_with = error
        for future in self._open:
            if not future.done():
                future.set_exception(error)

    async def _status(self, operation: Callable[[LoraManager], Future[VariantStatus]]) -> VariantStatus:
        status: VariantStatus = await self._call(operation)
        return status

    async def _call(self, operation: Callable[[LoraManager], Future[Any]]) -> Any:
        if self._ended_with is not None:
            raise self._ended_with
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()
        self._open.add(future)
        try:

            def answer(outcome: Any) -> None:
                loop.call_soon_threadsafe(_settle, future, outcome)

            self._send(LoraCall(operation, answer))
            return await future
        finally:
            self._open.discard(future)


def _statuses(loras: LoraManager) -> Future[Any]:
    reply: Future[Any] = Future()
    reply.set_result(loras.statuses())
    return reply


def _settle(future: asyncio.Future[Any], outcome: Any) -> None:
    if future.done():  # whoever waited has gone
        return
    if isinstance(outcome, BaseException):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)

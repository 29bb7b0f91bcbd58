"""The adapters of an engine without a model: the seam of AsyncLoras, with refusals that a test chooses."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

from model_worker.engine.lora.variant_status import VariantState, VariantStatus
from registry.errors import ModelNotFoundError, RootgraftError


class FakeLoras:
    """Every directory is an adapter of rank 8.

    Attributes:
        gate: while it is cleared, nothing is answered.
        reading: while it is cleared, additions go no further than to be listed as registered.
        is_read: set once an addition is listed as registered.
        refuse_with: refuse everything so.
        added: names in the order of their additions.
        digests: by directory, of those whose digest is not zero.
    """

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.gate.set()
        self.reading = asyncio.Event()
        self.reading.set()
        self.is_read = asyncio.Event()
        self.refuse_with: RootgraftError | None = None
        self.added: list[str] = []
        self.digests: dict[Path, str] = {}
        self._statuses: dict[str, VariantStatus] = {}

    async def add(
        self, name: str, path: Path, *, parent: str = "", pinned: bool = False, from_command_line: bool = False
    ) -> VariantStatus:
        status = VariantStatus(
            name=name,
            parent=parent,
            digest=self.digests.get(path, "sha256:" + "0" * 64),
            path=str(path),
            state="registered",
            pinned=pinned,
            from_command_line=from_command_line,
            rank=8,
            host_bytes=2**20,
            active_bytes=0,
            num_running=0,
            num_waiting=0,
            loads_total=1,
            load_s_total=0.5,
            activations_total=0,
            evictions_total=0,
            hits_total=0,
            requests_total=0,
            generation_tokens_total=0,
            error=None,
        )
        known = self._statuses.get(name)
        self._statuses.setdefault(name, status)
        self.is_read.set()
        try:
            await self.reading.wait()
            await self._answer()
        except RootgraftError:
            if known is None:
                del self._statuses[name]
            raise
        self.added.append(name)
        self._statuses[name] = replace(status, state="in_host_memory")
        return self._statuses[name]

    async def remove(self, name: str) -> VariantStatus:
        await self._change(name, state="draining")
        return self._statuses.pop(name)

    async def pin(self, name: str) -> VariantStatus:
        return await self._change(name, pinned=True)

    async def unpin(self, name: str) -> VariantStatus:
        return await self._change(name, pinned=False)

    async def activate(self, name: str) -> VariantStatus:
        return await self._change(name, state="active")

    async def evict(self, name: str) -> VariantStatus:
        return await self._change(name, state="on_disk")

    async def list(self) -> list[VariantStatus]:
        await self._answer()
        return list(self._statuses.values())

    async def _change(
        self, name: str, *, state: VariantState | None = None, pinned: bool | None = None
    ) -> VariantStatus:
        await self._answer()
        if name not in self._statuses:
            raise ModelNotFoundError(f"There is no adapter {name}.")
        status = self._statuses[name]
        status = replace(status, state=state or status.state, pinned=status.pinned if pinned is None else pinned)
        self._statuses[name] = status
        return status

    async def _answer(self) -> None:
        await self.gate.wait()
        if self.refuse_with is not None:
            raise self.refuse_with

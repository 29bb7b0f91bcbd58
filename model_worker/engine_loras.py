"""What the worker needs of an engine's adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from model_worker.engine.lora.variant_status import VariantStatus


class EngineLoras(Protocol):
    """`AsyncLLMEngine.loras` is the one.

    Every method raises RootgraftError when it refuses, and then nothing has changed.
    """

    async def add(
        self, name: str, path: Path, *, parent: str, pinned: bool, from_command_line: bool
    ) -> VariantStatus: ...
    async def remove(self, name: str) -> VariantStatus: ...
    async def pin(self, name: str) -> VariantStatus: ...
    async def unpin(self, name: str) -> VariantStatus: ...
    async def activate(self, name: str) -> VariantStatus: ...
    async def evict(self, name: str) -> VariantStatus: ...
    async def list(self) -> list[VariantStatus]: ...

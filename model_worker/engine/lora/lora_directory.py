"""All adapters that an engine knows, and the combinations that requests made of them. Pure Python; no torch."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from itertools import count
from pathlib import Path

from model_worker.engine.lora.lora_entry import LoraEntry
from model_worker.engine.lora.lora_weight import LoraWeight
from model_worker.engine.lora.variant import Variant
from model_worker.engine.lora.variant_status import VariantStatus
from registry.errors import InvalidRequestError, ModelNotFoundError


class LoraDirectory:
    """Finds entries; what becomes of them is the manager's business.

    Args:
        active_bytes: what being active takes beside host memory, where that is the same for all.

    Attributes:
        entries: all that are read, those without a name too, by what sequences know of them.
        by_name: those that new requests can ask for.
        combinations: by digest.
    """

    def __init__(self, active_bytes: int | None) -> None:
        self.entries: dict[Variant, LoraEntry] = {}
        self.by_name: dict[str, LoraEntry] = {}
        self.combinations: dict[str, LoraEntry] = {}
        self._active_bytes = active_bytes
        self._numbers = count(1)

    def new_entry(
        self,
        name: str,
        path: Path,
        *,
        parent: str,
        pinned: bool = False,
        from_command_line: bool = False,
        parts: tuple[tuple[LoraEntry, float], ...] = (),
    ) -> LoraEntry:
        """One that is not kept yet."""
        return LoraEntry(
            next(self._numbers),
            name,
            path,
            parent=parent,
            active_bytes=self._active_bytes,
            pinned=pinned,
            from_command_line=from_command_line,
            parts=parts,
        )

    def named(self, name: str) -> LoraEntry:
        """
        Raises:
            ModelNotFoundError: there is no such adapter.
        """
        entry = self.by_name.get(name)
        if entry is None:
            raise ModelNotFoundError(f"There is no fine-tune {name!r} here.", param="model")
        return entry

    def find(self, loras: Sequence[LoraWeight]) -> LoraEntry:
        """The entry of these adapters together, at least one; a combination that is new is not kept yet.

        Raises:
            ModelNotFoundError: there is no such adapter.
            InvalidRequestError: they cannot be combined.
            RootgraftError: one could not be loaded, for this reason.
        """
        parts = []
        for name, scale in loras:
            if not math.isfinite(scale):
                raise InvalidRequestError(f"The scale of {name} must be a finite number, got {scale}.", param="loras")
            entry = self.named(name)
            if entry.error is not None:
                raise entry.error
            parts.append((entry, scale))
        return parts[0][0] if len(parts) == 1 and parts[0][1] == 1.0 else self._combination(parts)

    def keep(self, entry: LoraEntry) -> None:
        """An adapter that was read, under its name, or a combination."""
        self.entries[entry.variant] = entry
        if entry.parts:
            self.combinations[entry.variant.digest] = entry
        else:
            self.by_name[entry.name] = entry

    def hide(self, entry: LoraEntry) -> None:
        """No new request finds it."""
        if self.by_name.get(entry.name) is entry:
            del self.by_name[entry.name]
        if self.combinations.get(entry.variant.digest) is entry:
            del self.combinations[entry.variant.digest]

    def forget(self, entry: LoraEntry) -> None:
        self.hide(entry)
        self.entries.pop(entry.variant, None)

    def combinations_with(self, part: LoraEntry) -> list[LoraEntry]:
        return [entry for entry in self.combinations.values() if any(each is part for each, _ in entry.parts)]

    @property
    def combination_bytes(self) -> int:
        """Memory of the combinations."""
        statuses = [entry.status() for entry in self.combinations.values()]
        return sum(status.host_bytes + status.active_bytes for status in statuses)

    def statuses(self) -> list[VariantStatus]:
        """Of all that have a name, or had one and still have requests. These come first."""
        entries = [entry for entry in self.entries.values() if entry.removed and not entry.parts]
        entries += self.by_name.values()
        return [entry.status() for entry in entries]

    def _combination(self, parts: list[tuple[LoraEntry, float]]) -> LoraEntry:
        """The entry of a combination, known already or not; the order of the parts does not matter."""
        for entry, _ in parts:
            if not entry.adds_only:
                raise InvalidRequestError(
                    f"Fine-tune {entry.name} replaces or scales weights of the base, so it can be used only by "
                    "itself and at scale 1.",
                    param="loras",
                )
        parts = sorted(parts, key=lambda part: (part[0].variant.digest, part[1]))
        content = "".join(f"{entry.variant.digest} {scale!r}\n" for entry, scale in parts)
        digest = "sha256:" + hashlib.sha256(content.encode()).hexdigest()
        known = self.combinations.get(digest)
        if known is not None:
            return known
        name = " + ".join(f"{scale:g} * {entry.name}" for entry, scale in parts)
        combination = self.new_entry(name, Path(), parent=parts[0][0].parent, parts=tuple(parts))
        combination.variant.digest = digest
        combination.host_bytes = sum(entry.host_bytes for entry, _ in parts)
        return combination

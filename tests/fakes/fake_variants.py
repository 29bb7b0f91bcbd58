"""The variants of a worker without a model: the states of controller/protocol.py, and files that are only digests."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from controller.protocol import AddVariantRequest, ErrorEvent, VariantStatus


def digest(text: str) -> str:
    """A well-formed digest, the same for the same text."""
    return f"sha256:{text.encode().hex():0<64}"[:71]


class VariantRefused(Exception):
    """What is asked for cannot be done; answered with `status` and `event`."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.event = ErrorEvent(code=code, message=message)


@dataclass(slots=True)
class FakeVariants:
    """Attributes:
    files: what the adapter root holds, path → digest; other paths are refused.
    deltas: those of these paths that hold no adapter.
    statuses: the variants as they are now, by name.
    calls: what was asked, as "add sql", in order.
    refuse: by "verb name": raised instead.
    hold: while it is set to an event that is not, adding waits.
    """

    files: dict[str, str] = field(default_factory=dict)
    deltas: set[str] = field(default_factory=set)
    statuses: dict[str, VariantStatus] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)
    refuse: dict[str, VariantRefused] = field(default_factory=dict)
    hold: asyncio.Event | None = None

    def from_command_line(self, name: str, path: str, *, parent: str = "m") -> None:
        self.statuses[name] = VariantStatus(
            name=name, parent=parent, path=path, digest=self.files[path], state="active", from_command_line=True
        )

    def change(self, name: str, **values: object) -> VariantStatus:
        self.statuses[name] = self.statuses[name].model_copy(update=values)
        return self.statuses[name]

    async def add(self, request: AddVariantRequest) -> VariantStatus:
        self._note("add", request.name)
        if self.hold is not None:
            await self.hold.wait()
        if request.path not in self.files:
            raise VariantRefused(400, "checkpoint_invalid", f"there is no adapter at {request.path}")
        files = self.files[request.path]
        has = self.statuses.get(request.name)
        if has is None or has.digest != files:
            self.statuses[request.name] = VariantStatus(
                name=request.name, parent=request.parent, kind="delta" if request.path in self.deltas else "lora",
                path=request.path, digest=files, state="in_host_memory", rank=8, loads_total=1, load_s_total=0.5,
            )  # fmt: skip
        return self._pinned(request.name, request.pinned)

    def tell(self, verb: str, name: str) -> VariantStatus:
        self._note(verb, name)
        if name not in self.statuses:
            raise VariantRefused(404, "model_not_found", f"there is no variant {name}")
        verbs: dict[str, Callable[[str], VariantStatus]] = {
            "remove": self._remove,
            "pin": lambda name: self._pinned(name, True),
            "unpin": lambda name: self._pinned(name, False),
            "activate": lambda name: self.change(name, state="active"),
            "evict": self._evict,
        }
        return verbs[verb](name)

    def _note(self, verb: str, name: str) -> None:
        call = f"{verb} {name}"
        self.calls.append(call)
        if call in self.refuse:
            raise self.refuse[call]

    def _pinned(self, name: str, pinned: bool) -> VariantStatus:
        state = "active" if pinned else self.statuses[name].state
        return self.change(name, pinned=pinned, state=state)

    def _remove(self, name: str) -> VariantStatus:
        if self.statuses[name].num_running:
            return self.change(name, state="draining")
        return self.statuses.pop(name)

    def _evict(self, name: str) -> VariantStatus:
        if self.statuses[name].pinned:
            raise VariantRefused(400, "invalid_request", f"{name} is pinned")
        return self.change(name, state="on_disk")

"""What the manager keeps of an adapter or of a combination of some. Pure Python; no torch."""

from __future__ import annotations

import math
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from model_worker.engine.lora.residency import RequestRate, Resident, value_of_keeping
from model_worker.engine.lora.variant import Bound, Variant
from model_worker.engine.lora.variant_status import VariantState, VariantStatus
from model_worker.engine.sequence import Sequence
from model_worker.engine.sequence_queue import SequenceQueue
from registry.errors import RootgraftError

_FIRST = (-math.inf,)


class Held(Protocol):
    """A variant in host memory: what its model binds, or has bound there."""

    @property
    def num_bytes(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Loaded:
    """What was read, and is now in host memory.

    Attributes:
        digest, rank, adds_only, num_extra_tokens: as of `VariantTerms`.
        seconds: that it took.
    """

    held: Held
    digest: str
    rank: int
    adds_only: bool
    num_extra_tokens: int
    seconds: float


class LoraEntry:
    """An adapter, or a combination of some, from its registration until its last request has ended.

    A name that is given other files gets another entry; sequences keep the variant of theirs.

        on disk ──load──► held, in host memory ──bind──► bound, active

    What is active is in host memory too, and where the model computes there, it is the same. Bytes are those of the
    last time that it was there.

    Attributes:
        variant: what sequences know of it.
        name: public name; a combination has none that anybody could ask for.
        parts: of a combination, with their scales.
        active_bytes: what being active takes beside host_bytes; None: not known yet.
        adds_only: it can be a part of a combination.
        held: what is in host memory.
        in_flight: the loader works on it.
        removed: no new request gets it.
        error: why it cannot be loaded.
        waiting, running: the sequences that hold it.
        closing_for: the entry that is to get its place: only sequences that go before it may still begin to run.
        activations: answers that are due when it is active.
        load_s, bind_s: what each took when it was done last; 0: never done.
        total_load_s: what all loads took.
    """

    def __init__(
        self,
        number: int,
        name: str,
        path: Path,
        *,
        parent: str,
        active_bytes: int | None,
        pinned: bool = False,
        from_command_line: bool = False,
        parts: tuple[tuple[LoraEntry, float], ...] = (),
    ) -> None:
        self.variant = Variant(number)
        self.name = name
        self.path = path
        self.parent = parent
        self.pinned = pinned
        self.from_command_line = from_command_line
        self.parts = parts
        self.rank = 0
        self.adds_only = False
        self.host_bytes = 0
        self.active_bytes = active_bytes
        self.held: Held | None = None
        self.in_flight = False
        self.removed = False
        self.error: RootgraftError | None = None
        self.waiting = SequenceQueue()
        self.waiting_since_s: dict[Sequence, float] = {}
        self.running: set[Sequence] = set()
        self.closing_for: LoraEntry | None = None
        self.activations: list[Future[VariantStatus]] = []
        self.request_rate = RequestRate()
        self.load_s = 0.0
        self.bind_s = 0.0
        self.num_loads = 0
        self.total_load_s = 0.0
        self.num_activations = 0
        self.num_evictions = 0
        self.num_hits = 0
        self.num_requests = 0

    @property
    def used(self) -> bool:
        return bool(self.running or self.waiting)

    @property
    def claim_rank(self) -> tuple[float, ...]:
        """Its place in the order in which entries become active: that of its first request; operators go before."""
        return _FIRST if self.pinned or self.activations or not self.waiting else self.waiting.first.rank

    @property
    def likely_active_bytes(self) -> int:
        return self.host_bytes if self.active_bytes is None else self.active_bytes

    @property
    def footprint_bytes(self) -> int:
        """What it takes to have it active."""
        return self.host_bytes + self.likely_active_bytes

    @property
    def state(self) -> VariantState:
        if self.error is not None:
            return "failed"
        if self.removed:
            return "draining"
        if not self.variant.digest:
            return "registered"
        if self.variant.bound is not None:
            return "active"
        return "on_disk" if self.held is None else "in_host_memory"

    def take(self, loaded: Loaded) -> None:
        """It is in host memory."""
        self.held = loaded.held
        self.host_bytes = loaded.held.num_bytes
        self.rank = loaded.rank
        self.adds_only = loaded.adds_only
        self.variant.num_extra_tokens = loaded.num_extra_tokens
        self.load_s = loaded.seconds
        self.num_loads += 1
        self.total_load_s += loaded.seconds

    def activate(self, bound: Bound) -> None:
        """It has a place."""
        self.variant.bound = bound
        self.num_activations += 1
        for reply in self.take_activations():
            reply.set_result(self.status())

    def wait(self, sequence: Sequence, now_s: float) -> None:
        """A sequence waits for it, new or preempted."""
        self.running.discard(sequence)
        self.waiting.add(sequence)
        self.waiting_since_s[sequence] = now_s

    def stop_waiting(self, sequence: Sequence) -> None:
        """A sequence waits no more, if it did."""
        if self.waiting_since_s.pop(sequence, None) is not None:
            self.waiting.remove(sequence)

    def take_activations(self) -> list[Future[VariantStatus]]:
        """The answers that are due, which are the caller's to give from now on."""
        taken, self.activations = self.activations, []
        return taken

    def as_active(self, now_s: float) -> Resident[LoraEntry]:
        """What keeping it active is worth, rather than only in host memory."""
        return self._resident(now_s, self.bind_s, self.footprint_bytes)

    def as_in_host_memory(self, now_s: float) -> Resident[LoraEntry]:
        """What keeping it in host memory is worth, rather than only on disk."""
        return self._resident(now_s, self.load_s, self.host_bytes)

    def status(self) -> VariantStatus:
        return VariantStatus(
            name=self.name,
            parent=self.parent,
            digest=self.variant.digest or None,
            path=str(self.path),
            state=self.state,
            pinned=self.pinned,
            from_command_line=self.from_command_line,
            rank=self.rank,
            host_bytes=0 if self.held is None else self.host_bytes,
            active_bytes=0 if self.variant.bound is None else self.likely_active_bytes,
            num_running=len(self.running),
            num_waiting=len(self.waiting),
            loads_total=self.num_loads,
            load_s_total=self.total_load_s,
            activations_total=self.num_activations,
            evictions_total=self.num_evictions,
            hits_total=self.num_hits,
            requests_total=self.num_requests,
            generation_tokens_total=self.variant.num_generation_tokens,
            error=None if self.error is None else self.error.message,
        )

    def _resident(self, now_s: float, reload_s: float, num_bytes: int) -> Resident[LoraEntry]:
        value = value_of_keeping(
            rate=self.request_rate.at(now_s),
            num_waiting=len(self.waiting),
            reload_s=reload_s,
            num_bytes=num_bytes,
        )
        return Resident(self, value, self.variant.number, num_bytes)

    def __repr__(self) -> str:
        return f"LoraEntry({self.name!r}, {self.state}, {len(self.running)} running, {len(self.waiting)} waiting)"

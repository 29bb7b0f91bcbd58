"""Who is active, who is in host memory, and who makes room for others. Pure Python; no torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from model_worker.engine.lora.lora_entry import LoraEntry
from model_worker.engine.lora.residency import choose_victims
from registry.errors import InsufficientMemoryError


@dataclass(frozen=True, slots=True)
class TierLimits:
    """What the tiers may hold.

    Attributes:
        max_active, max_in_host: entries; what is active is in host memory too.
        max_bytes: of both forms together.
    """

    max_active: int
    max_in_host: int
    max_bytes: int


class LoraTiers:
    """Two nested sets of entries, loads under way included, within the limits.

        in host memory   [ only there: may be dropped | active: running, pinned and loading ones stay ]
        bytes              host_bytes                   host_bytes + active_bytes

    So dropping all that is not active always makes room for what may become active. Where the model computes in host
    memory, active_bytes are 0: being active is a place and nothing more.

    Attributes:
        active, in_host: ordered sets.
    """

    def __init__(self, limits: TierLimits, clock: Callable[[], float]) -> None:
        self.limits = limits
        self.active: dict[LoraEntry, None] = {}
        self.in_host: dict[LoraEntry, None] = {}
        self._clock = clock

    @property
    def num_bytes(self) -> int:
        return sum(entry.host_bytes for entry in self.in_host) + sum(entry.likely_active_bytes for entry in self.active)

    # ------------------------------------------------------------------------------------------ room

    def check_fits(self, entry: LoraEntry, pinned: list[LoraEntry]) -> None:
        """Whether an entry could be active beside those that are pinned, were nobody else there.

        Raises:
            InsufficientMemoryError: it could not.
        """
        others = [other for other in pinned if other is not entry]
        num_bytes = sum(other.footprint_bytes for other in others)
        beside = f" beside the {len(others)} that are pinned" if others else ""
        unpin = "unpin an adapter or " if others else ""
        if len(others) >= self.limits.max_active:
            raise InsufficientMemoryError(
                f"Fine-tune {entry.name} finds no place{beside}; {unpin}raise --max-loras ({self.limits.max_active})."
            )
        if num_bytes + entry.footprint_bytes > self.limits.max_bytes:
            raise InsufficientMemoryError(
                f"Fine-tune {entry.name} takes {_mib(entry.footprint_bytes)}, which do not fit{beside} into "
                f"{_mib(self.limits.max_bytes)}; {unpin}raise --lora-memory-gib."
            )

    def has_room(self, entry: LoraEntry) -> bool:
        """It fits into host memory without anybody's making room."""
        return (
            len(self.in_host) < self.limits.max_in_host and self.num_bytes + entry.host_bytes <= self.limits.max_bytes
        )

    def make_room(self, entry: LoraEntry) -> bool:
        """Drop what has to go to have an entry in host memory, which then has a claim to it; False: not now."""
        if entry in self.in_host:
            return True
        return self._drop_for(entry, num_places=1, num_bytes=entry.host_bytes)

    def make_place(self, entry: LoraEntry) -> bool:
        """Evict what has to go to have an entry active, which then has a claim to it; False: not now."""
        assert entry not in self.active
        now_s = self._clock()
        num_places, num_bytes = self._lacking(entry)
        going = [other.as_active(now_s) for other in self.active if _idle(other) and _yields(other, entry)]
        victims = choose_victims(going, num_places=num_places, num_bytes=num_bytes)
        if victims is None:
            return False
        for victim in victims:
            self.deactivate(victim)
        num_more = 0 if entry in self.in_host else entry.host_bytes
        if not self._drop_for(entry, num_places=int(entry not in self.in_host), num_bytes=num_more, active=True):
            return False
        self.active[entry] = None
        return True

    def empty_place(self, entry: LoraEntry) -> None:
        """Let nobody else begin to run with those whose places an entry will get, once nothing runs there any more.

        At most half of all places are emptied at once: the others go on as usual.
        """
        closing = [other for other in self.active if other.closing_for is not None]
        mine = [other for other in closing if other.closing_for is entry]
        if len(closing) - len(mine) >= max(1, self.limits.max_active // 2):
            return
        now_s = self._clock()
        num_places, num_bytes = self._lacking(entry)
        num_places -= len(mine)
        num_bytes -= sum(other.footprint_bytes for other in mine)
        going = [
            other.as_active(now_s)
            for other in self.active
            if not other.in_flight and not other.pinned and other.closing_for is None and _yields(other, entry)
        ]
        for victim in choose_victims(going, num_places=num_places, num_bytes=num_bytes) or ():
            victim.closing_for = entry

    def stop_emptying(self, entry: LoraEntry) -> None:
        for other in self.active:
            if other.closing_for is entry:
                other.closing_for = None

    def shrink(self) -> None:
        """Let go of what is too much, now that sizes are known that had been guessed."""
        now_s = self._clock()
        excess = self._active_bytes() - self.limits.max_bytes
        idle = [other.as_active(now_s) for other in self.active if _idle(other)]
        victims = choose_victims(idle, num_places=0, num_bytes=excess)
        for victim in [other.key for other in idle] if victims is None else victims:
            self.deactivate(victim)
        excess = self.num_bytes - self.limits.max_bytes
        spare = [other.as_in_host_memory(now_s) for other in self.in_host if self._droppable(other)]
        victims = choose_victims(spare, num_places=0, num_bytes=excess)
        for victim in [other.key for other in spare] if victims is None else victims:
            self.drop(victim)

    # ------------------------------------------------------------------------------------------ leaving

    def deactivate(self, entry: LoraEntry) -> None:
        """It stays in host memory."""
        assert not entry.running
        del self.active[entry]
        if entry.variant.bound is not None:
            entry.variant.bound = None
            entry.num_evictions += 1
        entry.closing_for = None

    def drop(self, entry: LoraEntry) -> None:
        """Only its files stay."""
        if entry in self.active:
            self.deactivate(entry)
        if entry in self.in_host:
            del self.in_host[entry]
        if entry.held is not None:
            entry.held = None
            entry.num_evictions += 1

    def check_integrity(self) -> None:
        assert self.active.keys() <= self.in_host.keys()
        assert len(self.active) <= self.limits.max_active
        assert len(self.in_host) <= self.limits.max_in_host
        for entry in self.in_host:
            assert entry.held is not None or entry.in_flight
        for entry in self.active:
            assert entry.variant.bound is not None or entry.in_flight
            assert entry.closing_for is None or entry.closing_for not in self.active

    # ------------------------------------------------------------------------------------------ internal

    def _active_bytes(self) -> int:
        return sum(entry.footprint_bytes for entry in self.active)

    def _lacking(self, entry: LoraEntry) -> tuple[int, int]:
        """Places and bytes that have to become free among the active ones."""
        num_bytes = self._active_bytes() + entry.footprint_bytes - self.limits.max_bytes
        return len(self.active) + 1 - self.limits.max_active, num_bytes

    def _drop_for(self, entry: LoraEntry, *, num_places: int, num_bytes: int, active: bool = False) -> bool:
        num_places += len(self.in_host) - self.limits.max_in_host
        num_bytes += self.num_bytes - self.limits.max_bytes + (entry.likely_active_bytes if active else 0)
        now_s = self._clock()
        going = [
            other.as_in_host_memory(now_s)
            for other in self.in_host
            if other is not entry and self._droppable(other) and _yields(other, entry)
        ]
        victims = choose_victims(going, num_places=num_places, num_bytes=num_bytes)
        if victims is None:
            return False
        for victim in victims:
            self.drop(victim)
        self.in_host[entry] = None
        return True

    def _droppable(self, entry: LoraEntry) -> bool:
        return entry not in self.active and not entry.in_flight and not entry.pinned


def _idle(entry: LoraEntry) -> bool:
    return not (entry.running or entry.in_flight or entry.pinned)


def _yields(entry: LoraEntry, claimant: LoraEntry) -> bool:
    """Its requests, if any wait, come after those of the claimant."""
    return not (entry.waiting or entry.activations) or claimant.claim_rank < entry.claim_rank


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.1f} MiB"

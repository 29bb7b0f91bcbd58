"""Who needs an adapter that is not active, and who gets a place or room for it next. Pure Python; no torch."""

from __future__ import annotations

from collections.abc import Callable

from model_worker.engine.lora.lora_entry import LoraEntry
from model_worker.engine.lora.lora_loader import LoraLoader
from model_worker.engine.lora.lora_source import LoraSource
from model_worker.engine.lora.lora_tiers import LoraTiers
from model_worker.engine.sequence import Sequence
from registry.errors import InsufficientMemoryError, RootgraftError

Doomed = list[tuple[Sequence, RootgraftError]]
"""Waiting sequences whose variant cannot be had, and why."""


class LoraClaims:
    """Entries that somebody waits for, or that are pinned; each has a claim to a place.

    Claims are served in the order of the requests that wait, operators' before them; a place comes from the residency
    policy. Where all places are in use, a claim that is older than the patience has one emptied: nobody else begins to
    run there until it is free. So every request runs in the end, and batches are not broken up for those that come a
    moment too early.

    Args:
        tiers: places and room.
        patience_s: how long a request waits before a place is emptied for it.

    Attributes:
        doomed: who waits in vain, until somebody takes it.
    """

    def __init__(
        self,
        tiers: LoraTiers,
        loader: LoraLoader,
        source: LoraSource,
        *,
        patience_s: float,
        clock: Callable[[], float],
    ) -> None:
        self.doomed: Doomed = []
        self._tiers = tiers
        self._loader = loader
        self._source = source
        self._patience_s = patience_s
        self._clock = clock
        self._claimants: dict[LoraEntry, None] = {}  # an ordered set; those that are satisfied leave it at times

    def __bool__(self) -> bool:
        return bool(self._claimants)

    def add(self, entry: LoraEntry) -> None:
        self._claimants[entry] = None

    def give_up(self, entry: LoraEntry) -> None:
        self._claimants.pop(entry, None)
        self._tiers.stop_emptying(entry)

    def pinned(self) -> list[LoraEntry]:
        return [entry for entry in self._claimants if entry.pinned and entry.error is None]

    def has_waited_long(self, since_s: float) -> bool:
        """Longer than the patience."""
        return self._clock() - since_s >= self._patience_s

    def serve(self, *, may_load: bool) -> bool:
        """Activate what needs no load, and start the first load for which there is room; False: none was started.

        Who comes later never gets what an earlier one needs: once something is refused, nobody else asks for it. Only
        who waits for the loader lets others have a place, until patience ends.
        """
        for entry in [e for e in self._claimants if not (e.waiting or e.activations or e.pinned)]:
            self.give_up(entry)
        open_claims = [e for e in self._claimants if e not in self._tiers.active and e.error is None]
        may_have_place = may_have_room = True
        for entry in sorted(open_claims, key=lambda entry: entry.claim_rank):
            if entry.in_flight or not self._still_fits(entry):
                continue
            ready = entry.held if self._source.binds_in_place else None
            if ready is None and not may_load:
                may_have_place &= not self._has_lost_patience(entry)
                continue
            if may_have_place and self._tiers.make_place(entry):
                self._tiers.stop_emptying(entry)
                if ready is None:
                    self._loader.start(entry, bind=True)
                    return True
                entry.activate(self._source.bind(ready))
                continue
            may_have_place = False
            if self._has_lost_patience(entry):
                self._tiers.empty_place(entry)
            if entry.held is None and may_have_room:
                may_have_room = self._tiers.make_room(entry)
                if may_have_room:
                    self._loader.start(entry, bind=False)
                    return True
        return False

    def disappoint(self, entry: LoraEntry, error: RootgraftError) -> None:
        """Whoever waits for it does so in vain."""
        self.doomed += ((sequence, error) for sequence in entry.waiting)
        for reply in entry.take_activations():
            reply.set_exception(error)
        if entry.pinned:  # it has turned out to be larger than it was taken for
            entry.error = error
        self.give_up(entry)

    def _still_fits(self, entry: LoraEntry) -> bool:
        try:
            self._tiers.check_fits(entry, self.pinned())
        except InsufficientMemoryError as error:
            self.disappoint(entry, error)
            return False
        return True

    def _has_lost_patience(self, entry: LoraEntry) -> bool:
        if entry.pinned or entry.activations:
            return True
        return self.has_waited_long(entry.waiting_since_s[entry.waiting.first])

"""LoRA adapters while the engine runs: named, loaded, pinned, evicted, removed. Pure Python; no torch.

Everything here happens in the engine's thread, between steps; only loading does not (see lora_loader.py).
Whoever needs an adapter that is not active has a claim to a place. Claims are served in the order of the requests that
wait, operators' before them; a place comes from the residency policy. Where all places are in use, a claim that is
older than the patience has one emptied: nobody else begins to run there until it is free. So every request runs in the
end, and batches are not broken up for those that come a moment too early.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterable, Sequence as SequenceOf
from concurrent.futures import Future
from itertools import count
from pathlib import Path

from model_worker.engine.config import LoraConfig
from model_worker.engine.lora.lora_entry import LoraEntry
from model_worker.engine.lora.lora_loader import Loaded, LoadResult, LoraLoader, WorkQueue
from model_worker.engine.lora.lora_source import LoraSource
from model_worker.engine.lora.lora_tiers import LoraTiers, TierLimits
from model_worker.engine.lora.lora_weight import LoraWeight
from model_worker.engine.lora.variant import Bound, Variant
from model_worker.engine.lora.variant_status import VariantStatus
from model_worker.engine.sequence import Sequence
from registry.errors import (
    InsufficientMemoryError,
    InternalError,
    InvalidRequestError,
    ModelNotFoundError,
    RootgraftError,
)

Doomed = list[tuple[Sequence, RootgraftError]]
"""Waiting sequences whose variant cannot be had, and why."""

_MAX_IN_FLIGHT = 2  # one is loaded and one ready to be, so that the loader need not wait for a step to end
_CLAIMS_PER_ADDITION = 4  # loads for requests before one for an operator, where both wait


class LoraManager:
    """All adapters of an engine; the scheduler's `VariantGate`.

    The methods that change something return a future, which holds the state that resulted, or the RootgraftError that
    kept it from happening; only those of `add` and `activate` are not done at once.

    Args:
        config: limits.
        source: of adapters.
        memory_bytes: for all of them.
        work: the loader's thread.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        config: LoraConfig,
        source: LoraSource,
        *,
        memory_bytes: int,
        work: WorkQueue,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._patience_s = config.lora_patience_s
        self._clock = clock
        self._source = source
        self._loader = LoraLoader(source, work, clock=clock)
        self._tiers = LoraTiers(TierLimits(config.max_loras, config.most_in_host_memory, memory_bytes), clock)
        self._numbers = count(1)
        self._entries: dict[Variant, LoraEntry] = {}  # all that are read
        self._by_name: dict[str, LoraEntry] = {}
        self._combinations: dict[str, LoraEntry] = {}  # by digest
        self._additions: dict[LoraEntry, Future[VariantStatus]] = {}  # not read yet
        self._claimants: dict[LoraEntry, None] = {}  # an ordered set; those that are satisfied leave it at times
        self._num_claims_served = 0  # since the last addition
        self._doomed: Doomed = []

    # ------------------------------------------------------------------------------------------ operators

    def add(
        self, name: str, path: Path, *, parent: str = "", pinned: bool = False, from_command_line: bool = False
    ) -> Future[VariantStatus]:
        """Read an adapter and serve it under a name from then on.

        Other files under the same name replace the old ones, whose requests go on undisturbed; the same files leave
        everything as it is, but for `pinned`. An adapter that is refused leaves nothing behind.
        """
        entry = LoraEntry(
            next(self._numbers),
            name,
            path,
            parent=parent,
            active_bytes=self._source.active_bytes,
            pinned=pinned,
            from_command_line=from_command_line,
        )
        reply = self._additions[entry] = Future()
        return reply

    def remove(self, name: str) -> Future[VariantStatus]:
        """Serve it no more. Its requests go on; with the last one its memory is free."""
        additions = [entry for entry in self._additions if entry.name == name]
        for entry in additions:
            entry.removed = True
            reply = self._additions.pop(entry)
            reply.set_exception(InvalidRequestError(f"LoRA adapter {name} was removed while it was being read."))
        if additions and name not in self._by_name:
            return _done(additions[-1].status())
        return self._answer(name, self._retire)

    def pin(self, name: str) -> Future[VariantStatus]:
        """Keep it active; refused if it does not fit beside the others that are pinned."""
        return self._answer(name, self._pin)

    def unpin(self, name: str) -> Future[VariantStatus]:
        return self._answer(name, self._unpin)

    def activate(self, name: str) -> Future[VariantStatus]:
        """Bring it where requests can run with it, and be done then; a failed one is tried again."""
        try:
            entry = self._named(name)
            entry.error = None
            self._tiers.check_fits(entry, self._pinned())
        except RootgraftError as error:
            return _failed(error)
        if entry.variant.bound is not None:
            return _done(entry.status())
        reply: Future[VariantStatus] = Future()
        entry.activations.append(reply)
        self._claimants[entry] = None
        return reply

    def deactivate(self, name: str) -> Future[VariantStatus]:
        """Keep it in host memory only; refused while it is needed."""
        return self._answer(name, self._deactivate)

    def evict(self, name: str) -> Future[VariantStatus]:
        """Keep its files only; refused while it is needed."""
        return self._answer(name, self._evict)

    def statuses(self) -> list[VariantStatus]:
        """Of all that have a name, or had one and still have requests. These come first."""
        entries = [entry for entry in self._entries.values() if entry.removed and not entry.parts]
        entries += self._by_name.values()
        entries += (entry for entry in self._additions if entry.name not in self._by_name)
        return [entry.status() for entry in entries]

    @property
    def max_active(self) -> int:
        """Most adapters with which requests can run."""
        return self._tiers.limits.max_active

    @property
    def num_active(self) -> int:
        """Those of its places that are in use, by combinations too."""
        return len(self._tiers.active)

    @property
    def num_combinations(self) -> int:
        return len(self._combinations)

    @property
    def combination_bytes(self) -> int:
        """Memory of the combinations; that of the adapters is in their statuses."""
        statuses = [entry.status() for entry in self._combinations.values()]
        return sum(status.host_bytes + status.active_bytes for status in statuses)

    def summary(self) -> str:
        """For people: what is held at most."""
        limits = self._tiers.limits
        return (
            f"at most {limits.max_active} LoRA adapters active and {limits.max_in_host} in host memory, together "
            f"{limits.max_bytes / 2**30:.2f} GiB"
        )

    # ------------------------------------------------------------------------------------------ requests

    def resolve(self, loras: SequenceOf[LoraWeight]) -> Variant | None:
        """The variant for a new request; None: the base alone.

        Raises:
            ModelNotFoundError: there is no such adapter.
            InvalidRequestError: they cannot be combined.
            InsufficientMemoryError: what is pinned leaves no room for it.
            RootgraftError: it could not be loaded, for this reason.
        """
        if not loras:
            return None
        parts = []
        for name, scale in loras:
            if not math.isfinite(scale):
                raise InvalidRequestError(f"The scale of {name} must be a finite number, got {scale}.", param="loras")
            entry = self._named(name)
            if entry.error is not None:
                raise entry.error
            parts.append((entry, scale))
        entry = parts[0][0] if len(parts) == 1 and parts[0][1] == 1.0 else self._combination(parts)
        self._tiers.check_fits(entry, self._pinned())
        self._entries[entry.variant] = entry
        if entry.parts:
            self._combinations[entry.variant.digest] = entry
        return entry.variant

    def count_request(self, variant: Variant) -> None:
        """A request for it was accepted."""
        entry = self._entries[variant]
        entry.num_requests += 1
        entry.num_hits += variant.bound is not None
        entry.request_rate.observe(self._clock())

    # ------------------------------------------------------------------------------------------ the scheduler's gate

    def wait(self, sequence: Sequence) -> None:
        if sequence.variant is not None:
            entry = self._entries[sequence.variant]
            entry.running.discard(sequence)
            entry.waiting.add(sequence)
            entry.waiting_since_s[sequence] = self._clock()
            self._claimants[entry] = None

    def admits(self, sequence: Sequence) -> bool:
        if sequence.variant is None:
            return True
        if sequence.variant.bound is None:
            return False
        claimant = self._entries[sequence.variant].closing_for
        return claimant is None or sequence.rank < claimant.claim_rank

    def holds_up(self, sequence: Sequence) -> bool:
        if sequence.variant is None:
            return False
        since_s = self._entries[sequence.variant].waiting_since_s[sequence]
        return self._clock() - since_s >= self._patience_s

    def enter(self, sequence: Sequence) -> None:
        if sequence.variant is not None:
            assert sequence.variant.bound is not None
            entry = self._entries[sequence.variant]
            self._stop_waiting(entry, sequence)
            entry.running.add(sequence)

    def leave(self, sequence: Sequence) -> None:
        entry = None if sequence.variant is None else self._entries.get(sequence.variant)
        if entry is not None:
            self._stop_waiting(entry, sequence)
            entry.running.discard(sequence)
            if not entry.used:
                self._forget_if_useless(entry)

    # ------------------------------------------------------------------------------------------ between steps

    @property
    def loader(self) -> LoraLoader:
        return self._loader

    def advance(self) -> Doomed:
        """Take what has been loaded, and load what is wanted next. Returns who waits in vain."""
        for result in self._loader.results():
            self._take(result)
        if self._claimants or self._additions:
            self._serve()
        doomed, self._doomed = self._doomed, []
        return doomed

    def close(self) -> None:
        """Load nothing any more; what is not done fails."""
        self._loader.close()
        replies = list(self._additions.values())
        for entry in self._entries.values():
            replies += entry.activations
            entry.activations = []
        self._additions = {}
        for reply in replies:
            reply.set_exception(InternalError("The model worker is shutting down; try again."))

    def check_idle(self) -> None:
        """For an engine without requests.

        Raises:
            AssertionError: something is still held for one.
        """
        assert not any(entry.used or entry.removed for entry in self._entries.values())
        assert not self._doomed
        self._tiers.check_integrity()

    def check_integrity(self, running: Iterable[Sequence], waiting: Iterable[Sequence]) -> None:
        """Recount what is held by these, which are all there are.

        Raises:
            AssertionError: something leaked or is held twice.
        """
        self._tiers.check_integrity()
        of_entries = [(s, entry) for entry in self._entries.values() for s in entry.running]
        assert {s for s, _ in of_entries} == {s for s in running if s.variant is not None}
        assert all(s.variant is entry.variant and entry.variant.bound is not None for s, entry in of_entries)
        queued = [s for entry in self._entries.values() for s in entry.waiting]
        assert len(queued) == len(set(queued))
        assert set(queued) == {s for s in waiting if s.variant is not None}
        for entry in self._entries.values():
            assert set(entry.waiting) == entry.waiting_since_s.keys()
            assert entry.used or not entry.removed
            assert entry.variant.bound is None or entry in self._tiers.active
            assert entry.held is None or entry in self._tiers.in_host
        held = set(self._entries.values())
        assert self._tiers.in_host.keys() <= held
        assert {*self._by_name.values(), *self._combinations.values()} <= held

    # ------------------------------------------------------------------------------------------ internal: loads

    def _serve(self) -> None:
        """Activate and load what can be."""
        while True:
            may_load = self._loader.num_in_flight < _MAX_IN_FLIGHT
            addition = next((entry for entry in self._additions if not entry.in_flight), None) if may_load else None
            turn = addition is not None and self._num_claims_served >= _CLAIMS_PER_ADDITION
            if self._serve_claims(may_load=may_load and not turn):
                self._num_claims_served += 1
            elif addition is not None:
                self._num_claims_served = 0
                self._loader.start(addition, bind=False)
            else:
                return

    def _serve_claims(self, *, may_load: bool) -> bool:
        """Activate what needs no load, and start the first load for which there is room; False: none was started.

        Who comes later never gets what an earlier one needs: once something is refused, nobody else asks for it. Only
        who waits for the loader lets others have a place, until patience ends.
        """
        for entry in [e for e in self._claimants if not (e.waiting or e.activations or e.pinned)]:
            self._give_up_claim(entry)
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
                    self._start(entry, bind=True)
                    return True
                self._activate(entry, self._source.bind(ready))
                continue
            may_have_place = False
            if self._has_lost_patience(entry):
                self._tiers.empty_place(entry)
            if entry.held is None and may_have_room:
                may_have_room = self._tiers.make_room(entry)
                if may_have_room:
                    self._start(entry, bind=False)
                    return True
        return False

    def _still_fits(self, entry: LoraEntry) -> bool:
        try:
            self._tiers.check_fits(entry, self._pinned())
        except InsufficientMemoryError as error:
            self._disappoint(entry, error)
            return False
        return True

    def _start(self, entry: LoraEntry, *, bind: bool) -> None:
        self._loader.start(entry, bind=bind)
        self._forget_useless_combinations()  # some may have made room

    def _has_lost_patience(self, entry: LoraEntry) -> bool:
        if entry.pinned or entry.activations:
            return True
        return self._clock() - entry.waiting_since_s[entry.waiting.first] >= self._patience_s

    def _take(self, result: LoadResult) -> None:
        entry = result.entry
        if entry in self._additions:
            self._take_addition(entry, result)
        elif entry.variant not in self._entries:
            return  # removed in the meantime: what was loaded goes with the result
        elif result.error is not None:
            self._fail(entry, result.error)
        else:
            if result.loaded is not None:
                self._take_loaded(entry, result.loaded)
            if result.bound is not None:
                entry.active_bytes = 0 if result.bound is entry.held else result.bound.num_bytes
                entry.bind_s = result.bind_s
                self._activate(entry, result.bound)
            self._tiers.shrink()
            self._forget_if_useless(entry)

    def _take_addition(self, entry: LoraEntry, result: LoadResult) -> None:
        reply = self._additions.pop(entry)
        if result.error is not None:
            reply.set_exception(result.error)
            return
        assert result.loaded is not None
        old = self._by_name.get(entry.name)
        try:
            if old is not None and old.error is None and old.variant.digest == result.loaded.digest:
                (self._pin if entry.pinned else self._unpin)(old)
                reply.set_result(old.status())
                return
            entry.variant.digest = result.loaded.digest
            self._take_loaded(entry, result.loaded)
            others = [other for other in self._pinned() if other is not old] if entry.pinned else []
            self._tiers.check_fits(entry, others)
        except RootgraftError as error:
            reply.set_exception(error)
            return
        if old is not None:
            self._retire(old)
        self._by_name[entry.name] = self._entries[entry.variant] = entry
        if self._tiers.has_room(entry):
            self._tiers.in_host[entry] = None
        else:
            entry.held = None
        if entry.pinned:
            self._claimants[entry] = None
        reply.set_result(entry.status())

    def _take_loaded(self, entry: LoraEntry, loaded: Loaded) -> None:
        entry.held = loaded.held
        entry.host_bytes = loaded.held.num_bytes
        entry.rank = loaded.rank
        entry.adds_only = loaded.adds_only
        entry.load_s = loaded.seconds
        entry.num_loads += 1
        entry.total_load_s += loaded.seconds

    def _activate(self, entry: LoraEntry, bound: Bound) -> None:
        """It has a place."""
        entry.variant.bound = bound
        entry.num_activations += 1
        for reply in _taken(entry.activations):
            reply.set_result(entry.status())

    def _fail(self, entry: LoraEntry, error: RootgraftError) -> None:
        """It cannot be loaded, and will not be tried again until somebody asks for that."""
        entry.error = error
        self._tiers.drop(entry)
        self._disappoint(entry, error)

    def _disappoint(self, entry: LoraEntry, error: RootgraftError) -> None:
        """Whoever waits for it does so in vain."""
        self._doomed += ((sequence, error) for sequence in entry.waiting)
        for reply in _taken(entry.activations):
            reply.set_exception(error)
        if entry.pinned:  # it has turned out to be larger than it was taken for
            entry.error = error
        self._give_up_claim(entry)

    def _give_up_claim(self, entry: LoraEntry) -> None:
        self._claimants.pop(entry, None)
        self._tiers.stop_emptying(entry)

    # ------------------------------------------------------------------------------------------ internal: entries

    def _named(self, name: str) -> LoraEntry:
        entry = self._by_name.get(name)
        if entry is None:
            raise ModelNotFoundError(f"There is no LoRA adapter {name!r} here.", param="model")
        return entry

    def _pinned(self) -> list[LoraEntry]:
        return [entry for entry in self._claimants if entry.pinned and entry.error is None]

    def _answer(self, name: str, change: Callable[[LoraEntry], None]) -> Future[VariantStatus]:
        try:
            entry = self._named(name)
            change(entry)
        except RootgraftError as error:
            return _failed(error)
        return _done(entry.status())

    def _pin(self, entry: LoraEntry) -> None:
        if entry.error is not None:
            raise entry.error
        self._tiers.check_fits(entry, self._pinned())
        entry.pinned = True
        if entry.closing_for is not None:
            self._tiers.stop_emptying(entry.closing_for)
        self._claimants[entry] = None

    def _unpin(self, entry: LoraEntry) -> None:
        entry.pinned = False

    def _deactivate(self, entry: LoraEntry) -> None:
        needed = [
            (entry.pinned, "it is pinned; unpin it first"),
            (bool(entry.running), f"{len(entry.running)} requests run with it"),
            (entry.in_flight, "it is being loaded"),
        ]
        for is_needed, reason in needed:
            if is_needed:
                raise InvalidRequestError(f"LoRA adapter {entry.name} has to stay: {reason}.")
        if entry in self._tiers.active:
            self._tiers.deactivate(entry)

    def _evict(self, entry: LoraEntry) -> None:
        self._deactivate(entry)
        self._tiers.drop(entry)
        self._loader.return_memory()

    def _combination(self, parts: list[tuple[LoraEntry, float]]) -> LoraEntry:
        """The entry of a combination, known already or not; the order of the parts does not matter."""
        for entry, _ in parts:
            if not entry.adds_only:
                raise InvalidRequestError(
                    f"LoRA adapter {entry.name} replaces or scales weights of the base, so it can be used only by "
                    "itself and at scale 1.",
                    param="loras",
                )
        parts = sorted(parts, key=lambda part: (part[0].variant.digest, part[1]))
        content = "".join(f"{entry.variant.digest} {scale!r}\n" for entry, scale in parts)
        digest = "sha256:" + hashlib.sha256(content.encode()).hexdigest()
        known = self._combinations.get(digest)
        if known is not None:
            return known
        self._forget_useless_combinations()  # among them those whose requests were refused
        name = " + ".join(f"{scale:g} * {entry.name}" for entry, scale in parts)
        combination = LoraEntry(
            next(self._numbers),
            name,
            Path(),
            parent=parts[0][0].parent,
            active_bytes=self._source.active_bytes,
            parts=tuple(parts),
        )
        combination.variant.digest = digest
        combination.host_bytes = sum(entry.host_bytes for entry, _ in parts)
        return combination

    def _retire(self, entry: LoraEntry) -> None:
        """Let nobody new have it; it goes with its last request."""
        if self._by_name.get(entry.name) is entry:
            del self._by_name[entry.name]
        if self._combinations.get(entry.variant.digest) is entry:
            del self._combinations[entry.variant.digest]
        entry.removed = True
        entry.pinned = False
        for reply in _taken(entry.activations):
            reply.set_exception(InvalidRequestError(f"LoRA adapter {entry.name} was removed."))
        for other in list(self._combinations.values()):
            if any(part is entry for part, _ in other.parts):
                self._retire(other)
        self._forget_if_useless(entry)

    def _forget_useless_combinations(self) -> None:
        for entry in list(self._combinations.values()):
            self._forget_if_useless(entry)

    def _forget_if_useless(self, entry: LoraEntry) -> None:
        """Once nobody uses it: what is removed, and combinations that are not in memory."""
        gone = entry.parts and entry.held is None and not entry.in_flight
        if entry.used or not (entry.removed or gone):
            return
        if entry.held is not None:
            self._loader.return_memory()
        self._give_up_claim(entry)
        self._tiers.drop(entry)
        self._entries.pop(entry.variant, None)
        if self._combinations.get(entry.variant.digest) is entry:
            del self._combinations[entry.variant.digest]

    def _stop_waiting(self, entry: LoraEntry, sequence: Sequence) -> None:
        if entry.waiting_since_s.pop(sequence, None) is not None:
            entry.waiting.remove(sequence)


def _taken(replies: list[Future[VariantStatus]]) -> list[Future[VariantStatus]]:
    """The replies, of which the list is empty afterwards."""
    taken = replies.copy()
    replies.clear()
    return taken


def _done(status: VariantStatus) -> Future[VariantStatus]:
    reply: Future[VariantStatus] = Future()
    reply.set_result(status)
    return reply


def _failed(error: RootgraftError) -> Future[VariantStatus]:
    reply: Future[VariantStatus] = Future()
    reply.set_exception(error)
    return reply

"""LoRA adapters while the engine runs: named, loaded, pinned, evicted, removed. Pure Python; no torch.

    LoraDirectory    which adapters there are, by name and by content
    LoraClaims       who needs one that is not active, and who is next
    LoraTiers        what is active and what is in host memory, and who makes room
    LoraRemovals     how what nobody uses goes
    LoraLoader       reads and binds, on a thread of its own

Everything but the loader's work happens in the engine's thread, between steps.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence as SequenceOf
from concurrent.futures import Future
from pathlib import Path

from model_worker.engine.config import LoraConfig
from model_worker.engine.lora.lora_claims import Doomed, LoraClaims
from model_worker.engine.lora.lora_directory import LoraDirectory
from model_worker.engine.lora.lora_entry import LoraEntry
from model_worker.engine.lora.lora_loader import LoadResult, LoraLoader, WorkQueue
from model_worker.engine.lora.lora_removals import LoraRemovals
from model_worker.engine.lora.lora_source import LoraSource
from model_worker.engine.lora.lora_tiers import LoraTiers, TierLimits
from model_worker.engine.lora.lora_weight import LoraWeight
from model_worker.engine.lora.variant import Variant
from model_worker.engine.lora.variant_status import VariantStatus
from model_worker.engine.sequence import Sequence
from registry.errors import InternalError, InvalidRequestError, RootgraftError

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
        self._clock = clock
        self._loader = LoraLoader(source, work, clock=clock)
        self._tiers = LoraTiers(TierLimits(config.max_loras, config.most_in_host_memory, memory_bytes), clock)
        self._claims = LoraClaims(self._tiers, self._loader, source, patience_s=config.lora_patience_s, clock=clock)
        self._directory = LoraDirectory(source.active_bytes)
        self._removals = LoraRemovals(self._directory, self._claims, self._tiers, self._loader)
        self._additions: dict[LoraEntry, Future[VariantStatus]] = {}  # not read yet
        self._num_claims_served = 0  # since the last addition

    # ------------------------------------------------------------------------------------------ operators

    def add(
        self, name: str, path: Path, *, parent: str = "", pinned: bool = False, from_command_line: bool = False
    ) -> Future[VariantStatus]:
        """Read an adapter and serve it under a name from then on.

        Other files under the same name replace the old ones, whose requests go on undisturbed; the same files leave
        everything as it is, but for `pinned`. An adapter that is refused leaves nothing behind.
        """
        entry = self._directory.new_entry(name, path, parent=parent, pinned=pinned, from_command_line=from_command_line)
        reply = self._additions[entry] = Future()
        return reply

    def remove(self, name: str) -> Future[VariantStatus]:
        """Serve it no more. Its requests go on; with the last one its memory is free."""
        additions = [entry for entry in self._additions if entry.name == name]
        for entry in additions:
            entry.removed = True
            reply = self._additions.pop(entry)
            reply.set_exception(InvalidRequestError(f"Fine-tune {name} was removed while it was being read."))
        if additions and name not in self._directory.by_name:
            return _done(additions[-1].status())
        return self._answer(name, self._removals.retire)

    def pin(self, name: str) -> Future[VariantStatus]:
        """Keep it active; refused if it does not fit beside the others that are pinned."""
        return self._answer(name, self._pin)

    def unpin(self, name: str) -> Future[VariantStatus]:
        return self._answer(name, self._unpin)

    def activate(self, name: str) -> Future[VariantStatus]:
        """Bring it where requests can run with it, and be done then; a failed one is tried again."""
        try:
            entry = self._directory.named(name)
            entry.error = None
            self._tiers.check_fits(entry, self._claims.pinned())
        except RootgraftError as error:
            return _failed(error)
        if entry.variant.bound is not None:
            return _done(entry.status())
        reply: Future[VariantStatus] = Future()
        entry.activations.append(reply)
        self._claims.add(entry)
        return reply

    def deactivate(self, name: str) -> Future[VariantStatus]:
        """Keep it in host memory only; refused while it is needed."""
        return self._answer(name, self._deactivate)

    def evict(self, name: str) -> Future[VariantStatus]:
        """Keep its files only; refused while it is needed."""
        return self._answer(name, self._evict)

    def statuses(self) -> list[VariantStatus]:
        """Of all that have a name, or had one and still have requests. These come first; those not yet read, last."""
        names = self._directory.by_name
        return self._directory.statuses() + [entry.status() for entry in self._additions if entry.name not in names]

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
        return len(self._directory.combinations)

    @property
    def combination_bytes(self) -> int:
        """Memory of the combinations; that of the adapters is in their statuses."""
        return self._directory.combination_bytes

    def summary(self) -> str:
        """For people: what is held at most."""
        limits = self._tiers.limits
        return (
            f"at most {limits.max_active} fine-tunes active and {limits.max_in_host} in host memory, together "
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
        entry = self._directory.find(loras)
        if entry.variant not in self._directory.entries:
            self._removals.forget_useless_combinations()  # among them those whose requests were refused
        self._tiers.check_fits(entry, self._claims.pinned())
        self._directory.keep(entry)
        return entry.variant

    def count_request(self, variant: Variant) -> None:
        """A request for it was accepted."""
        entry = self._entry(variant)
        entry.num_requests += 1
        entry.num_hits += variant.bound is not None
        entry.request_rate.observe(self._clock())

    # ------------------------------------------------------------------------------------------ the scheduler's gate

    def wait(self, sequence: Sequence) -> None:
        if sequence.variant is not None:
            entry = self._entry(sequence.variant)
            entry.wait(sequence, self._clock())
            self._claims.add(entry)

    def admits(self, sequence: Sequence) -> bool:
        if sequence.variant is None:
            return True
        if sequence.variant.bound is None:
            return False
        claimant = self._entry(sequence.variant).closing_for
        return claimant is None or sequence.rank < claimant.claim_rank

    def holds_up(self, sequence: Sequence) -> bool:
        if sequence.variant is None:
            return False
        return self._claims.has_waited_long(self._entry(sequence.variant).waiting_since_s[sequence])

    def enter(self, sequence: Sequence) -> None:
        if sequence.variant is not None:
            assert sequence.variant.bound is not None
            entry = self._entry(sequence.variant)
            entry.stop_waiting(sequence)
            entry.running.add(sequence)

    def leave(self, sequence: Sequence) -> None:
        entry = None if sequence.variant is None else self._directory.entries.get(sequence.variant)
        if entry is not None:
            entry.stop_waiting(sequence)
            entry.running.discard(sequence)
            if not entry.used:
                self._removals.forget_if_useless(entry)

    # ------------------------------------------------------------------------------------------ between steps

    @property
    def loader(self) -> LoraLoader:
        return self._loader

    def advance(self) -> Doomed:
        """Take what has been loaded, and load what is wanted next. Returns who waits in vain."""
        for result in self._loader.results():
            self._take(result)
        if self._claims or self._additions:
            self._serve()
        doomed, self._claims.doomed = self._claims.doomed, []
        return doomed

    def close(self) -> None:
        """Load nothing any more; what is not done fails."""
        self._loader.close()
        replies = list(self._additions.values())
        for entry in self._directory.entries.values():
            replies += entry.take_activations()
        self._additions = {}
        for reply in replies:
            reply.set_exception(InternalError("The model worker is shutting down; try again."))

    def check_idle(self) -> None:
        """For an engine without requests.

        Raises:
            AssertionError: something is still held for one.
        """
        assert not any(entry.used or entry.removed for entry in self._directory.entries.values())
        assert not self._claims.doomed
        self._tiers.check_integrity()

    def check_integrity(self, running: Iterable[Sequence], waiting: Iterable[Sequence]) -> None:
        """Recount what is held by these, which are all there are.

        Raises:
            AssertionError: something leaked or is held twice.
        """
        self._tiers.check_integrity()
        of_entries = [(s, entry) for entry in self._directory.entries.values() for s in entry.running]
        assert {s for s, _ in of_entries} == {s for s in running if s.variant is not None}
        assert all(s.variant is entry.variant and entry.variant.bound is not None for s, entry in of_entries)
        queued = [s for entry in self._directory.entries.values() for s in entry.waiting]
        assert len(queued) == len(set(queued))
        assert set(queued) == {s for s in waiting if s.variant is not None}
        for entry in self._directory.entries.values():
            assert set(entry.waiting) == entry.waiting_since_s.keys()
            assert entry.used or not entry.removed
            assert entry.variant.bound is None or entry in self._tiers.active
            assert entry.held is None or entry in self._tiers.in_host
        held = set(self._directory.entries.values())
        assert self._tiers.in_host.keys() <= held
        assert {*self._directory.by_name.values(), *self._directory.combinations.values()} <= held

    # ------------------------------------------------------------------------------------------ internal: loads

    def _serve(self) -> None:
        """Activate and load what can be."""
        while True:
            may_load = self._loader.num_in_flight < _MAX_IN_FLIGHT
            addition = next((entry for entry in self._additions if not entry.in_flight), None) if may_load else None
            turn = addition is not None and self._num_claims_served >= _CLAIMS_PER_ADDITION
            if self._claims.serve(may_load=may_load and not turn):
                self._num_claims_served += 1
                self._removals.forget_useless_combinations()  # some may have made room
            elif addition is not None:
                self._num_claims_served = 0
                self._loader.start(addition, bind=False)
            else:
                return

    def _take(self, result: LoadResult) -> None:
        entry = result.entry
        if entry in self._additions:
            self._take_addition(entry, result)
        elif entry.variant not in self._directory.entries:
            return  # removed in the meantime: what was loaded goes with the result
        elif result.error is not None:
            self._fail(entry, result.error)
        else:
            if result.loaded is not None:
                entry.take(result.loaded)
            if result.bound is not None:
                entry.active_bytes = 0 if result.bound is entry.held else result.bound.num_bytes
                entry.bind_s = result.bind_s
                entry.activate(result.bound)
            self._tiers.shrink()
            self._removals.forget_if_useless(entry)

    def _take_addition(self, entry: LoraEntry, result: LoadResult) -> None:
        reply = self._additions.pop(entry)
        if result.error is not None:
            reply.set_exception(result.error)
            return
        assert result.loaded is not None
        old = self._directory.by_name.get(entry.name)
        try:
            if old is not None and old.error is None and old.variant.digest == result.loaded.digest:
                (self._pin if entry.pinned else self._unpin)(old)
                reply.set_result(old.status())
                return
            entry.variant.digest = result.loaded.digest
            entry.take(result.loaded)
            others = [other for other in self._claims.pinned() if other is not old] if entry.pinned else []
            self._tiers.check_fits(entry, others)
        except RootgraftError as error:
            reply.set_exception(error)
            return
        if old is not None:
            self._removals.retire(old)
        self._directory.keep(entry)
        if self._tiers.has_room(entry):
            self._tiers.in_host[entry] = None
        else:
            entry.held = None
        if entry.pinned:
            self._claims.add(entry)
        reply.set_result(entry.status())

    def _fail(self, entry: LoraEntry, error: RootgraftError) -> None:
        """It cannot be loaded, and will not be tried again until somebody asks for that."""
        entry.error = error
        self._tiers.drop(entry)
        self._claims.disappoint(entry, error)

    # ------------------------------------------------------------------------------------------ internal: entries

    def _entry(self, variant: Variant) -> LoraEntry:
        return self._directory.entries[variant]

    def _answer(self, name: str, change: Callable[[LoraEntry], None]) -> Future[VariantStatus]:
        try:
            entry = self._directory.named(name)
            change(entry)
        except RootgraftError as error:
            return _failed(error)
        return _done(entry.status())

    def _pin(self, entry: LoraEntry) -> None:
        if entry.error is not None:
            raise entry.error
        self._tiers.check_fits(entry, self._claims.pinned())
        entry.pinned = True
        if entry.closing_for is not None:
            self._tiers.stop_emptying(entry.closing_for)
        self._claims.add(entry)

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
                raise InvalidRequestError(f"Fine-tune {entry.name} has to stay: {reason}.")
        if entry in self._tiers.active:
            self._tiers.deactivate(entry)

    def _evict(self, entry: LoraEntry) -> None:
        self._deactivate(entry)
        self._tiers.drop(entry)
        self._loader.return_memory()


def _done(status: VariantStatus) -> Future[VariantStatus]:
    reply: Future[VariantStatus] = Future()
    reply.set_result(status)
    return reply


def _failed(error: RootgraftError) -> Future[VariantStatus]:
    reply: Future[VariantStatus] = Future()
    reply.set_exception(error)
    return reply

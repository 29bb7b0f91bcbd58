"""Whatever is added, removed, pinned, evicted, asked for and loaded, in any order."""

from __future__ import annotations

from concurrent.futures import Future
from itertools import count

from hypothesis import settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from model_worker.engine.lora.lora_entry import LoraEntry
from model_worker.engine.lora.lora_weight import LoraWeight
from model_worker.engine.lora.variant_status import VariantStatus
from model_worker.engine.sampling_params import SamplingParams
from model_worker.engine.sequence import Sequence
from registry.errors import ClientError, InternalError, RootgraftError
from tests.fakes.fake_adapters import FakeAdapters, FakeTerms, ManualWork, make_manager
from tests.fakes.fake_clock import FakeClock

NAMES = "abcd"
NAME = st.sampled_from(NAMES)
MAX_LORAS, MAX_CPU_LORAS, MEMORY_BYTES = 2, 3, 130


class ManagerMachine(RuleBasedStateMachine):
    """Plays operators, the scheduler and the loader."""

    BINDS_IN_PLACE = False

    def __init__(self) -> None:
        super().__init__()
        self.clock = FakeClock()
        self.adapters = FakeAdapters(self.clock, read_s=0.1, bind_s=0.01)
        self.work = ManualWork()
        self.manager = make_manager(
            self.adapters,
            self.work,
            max_loras=MAX_LORAS,
            max_cpu_loras=MAX_CPU_LORAS,
            memory_bytes=MEMORY_BYTES,
            binds_in_place=self.BINDS_IN_PLACE,
        )
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.replies: list[Future[VariantStatus]] = []
        self.numbers = count()
        self.pinned_and_active: dict[LoraEntry, int] = {}  # and the evictions until then

    @initialize()
    def begin(self) -> None:
        for name in NAMES:
            self.add(name, 0, 20, 0, False)
            self.load_all()

    # ------------------------------------------------------------------------------------------ operators

    @rule(
        name=NAME, version=st.integers(0, 1), size=st.integers(5, 30), growth=st.integers(-4, 20), pinned=st.booleans()
    )
    def add(self, name: str, version: int, size: int, growth: int, pinned: bool) -> None:
        terms = FakeTerms(f"sha256:{name}{version}/{size}", num_bytes=size, bound_bytes=size + growth)
        self.replies.append(self.manager.add(name, self.adapters.write(f"{name}{version}", terms), pinned=pinned))

    @rule(name=NAME, change=st.sampled_from(["remove", "pin", "unpin", "activate", "deactivate", "evict"]))
    def change(self, name: str, change: str) -> None:
        self.replies.append(getattr(self.manager, change)(name))

    @rule(name=NAME, what=st.sampled_from(["read", "bind"]))
    def break_files(self, name: str, what: str) -> None:
        for terms in self.adapters.files.values():
            if terms.digest.startswith(f"sha256:{name}"):
                self.adapters.refuse[f"{what} {terms.digest}"] = InternalError("broken")

    @rule()
    def mend_files(self) -> None:
        self.adapters.refuse.clear()

    # ------------------------------------------------------------------------------------------ requests

    @rule(
        loras=st.lists(st.tuples(NAME, st.sampled_from([1.0, 0.5])), max_size=2).map(
            lambda pairs: [LoraWeight(*pair) for pair in pairs]
        ),
        priority=st.integers(0, 1),
    )
    def arrive(self, loras: list[LoraWeight], priority: int) -> None:
        try:
            variant = self.manager.resolve(loras)
        except RootgraftError:
            return
        sequence = Sequence(next(self.numbers), 0, [1], SamplingParams(priority=priority), seed=0, variant=variant)
        self.manager.wait(sequence)
        if variant is not None:
            self.manager.count_request(variant)
        self.waiting.append(sequence)

    @precondition(lambda self: any(self.manager.admits(sequence) for sequence in self.waiting))
    @rule(data=st.data())
    def enter(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from([s for s in self.waiting if self.manager.admits(s)]))
        self.manager.enter(sequence)
        self.waiting.remove(sequence)
        self.running.append(sequence)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def preempt(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(self.running))
        self.running.remove(sequence)
        self.waiting.append(sequence)
        self.manager.wait(sequence)

    @precondition(lambda self: self.running or self.waiting)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        self._end(data.draw(st.sampled_from(self.running + self.waiting)))

    @rule(seconds=st.floats(0, 2))
    def time_passes(self, seconds: float) -> None:
        self.clock.advance(seconds)

    # ------------------------------------------------------------------------------------------ loading

    @rule()
    def advance(self) -> None:
        for sequence, error in self.manager.advance():
            assert isinstance(error, RootgraftError)
            assert sequence in self.waiting
            self._end(sequence)

    @precondition(lambda self: self.work.queued)
    @rule()
    def load_one(self) -> None:
        self.work.queued.pop(0)()

    @rule()
    def load_all(self) -> None:
        for _ in range(8):
            self.advance()
            self.work.work()
        self.advance()

    # ------------------------------------------------------------------------------------------ what always holds

    @invariant()
    def nothing_is_lost_or_held_twice(self) -> None:
        self.manager.check_integrity(self.running, self.waiting)
        for sequence in self.running:
            assert sequence.variant is None or sequence.variant.bound is not None

    @invariant()
    def what_is_pinned_stays(self) -> None:
        entries = self.manager._directory.by_name.values()
        pinned = {entry for entry in entries if entry.pinned}
        for entry in self.pinned_and_active.keys() & pinned:
            assert entry.variant.bound is not None
            assert entry.num_evictions == self.pinned_and_active[entry]
        self.pinned_and_active = {entry: entry.num_evictions for entry in pinned if entry.variant.bound is not None}

    @invariant()
    def no_more_is_held_than_allowed_but_for_what_runs(self) -> None:
        active = list(self.manager._tiers.active)
        held = self.manager._tiers.num_bytes
        needed = sum(e.footprint_bytes for e in active if e.running or e.pinned or e.in_flight)
        in_flight = sum(e.host_bytes for e in self.manager._tiers.in_host if e.in_flight or e.pinned)
        assert held <= max(MEMORY_BYTES, needed + in_flight)

    def teardown(self) -> None:
        """Everybody finishes, and then nothing is held for anybody."""
        self.adapters.refuse.clear()
        for _ in range(500):
            self.clock.advance(0.5)
            self.advance()
            self.work.work()
            for sequence in sorted(self.waiting, key=lambda s: s.rank):
                if self.manager.admits(sequence):
                    self.manager.enter(sequence)
                    self.waiting.remove(sequence)
                    self.running.append(sequence)
            for sequence in self.running.copy():
                self._end(sequence)
            if not (self.waiting or self.manager.loader.num_in_flight or self._open_replies()):
                break
        assert not self.waiting, "somebody waits for ever"
        assert not self._open_replies(), "an operator waits for ever"
        self.manager.check_idle()
        for name in NAMES:
            self.manager.remove(name)
        self.advance()
        self.work.work()
        self.advance()
        assert self.manager.statuses() == []
        assert self.manager._tiers.num_bytes == 0
        for reply in self.replies:
            assert reply.exception(0) is None or isinstance(reply.exception(0), ClientError | InternalError)

    def _open_replies(self) -> list[Future[VariantStatus]]:
        return [reply for reply in self.replies if not reply.done()]

    def _end(self, sequence: Sequence) -> None:
        (self.running if sequence in self.running else self.waiting).remove(sequence)
        self.manager.leave(sequence)


class InPlaceMachine(ManagerMachine):
    """What is in host memory is what the model computes with."""

    BINDS_IN_PLACE = True


for machine in (ManagerMachine, InPlaceMachine):
    machine.TestCase.settings = settings(max_examples=100, stateful_step_count=50, deadline=None)
TestManager = ManagerMachine.TestCase
TestManagerInPlace = InPlaceMachine.TestCase

"""Adapters without tensors, and a loader without a thread."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from model_worker.engine.config import LoraConfig
from model_worker.engine.lora.lora_manager import LoraManager
from model_worker.engine.lora.lora_source import LoraSource
from registry.errors import CheckpointError, RootgraftError
from tests.fakes.fake_clock import FakeClock


@dataclass(frozen=True)
class FakeTerms:
    digest: str
    num_bytes: int = 10
    max_rank: int = 8
    adds_only: bool = True
    num_extra_tokens: int = 0
    bound_bytes: int | None = None  # None: as many as here


@dataclass(frozen=True)
class FakeBound:
    digest: str
    num_bytes: int
    num_extra_tokens: int = 0


class FakeAdapters:
    """What is on disk, by path; each load takes a time of its own.

    Attributes:
        refuse: raised by the next `read` or `bind` of a digest.
        num_reads: by path.
    """

    def __init__(self, clock: FakeClock | None = None, *, read_s: float = 0.0, bind_s: float = 0.0) -> None:
        self.clock = clock or FakeClock()
        self.files: dict[Path, FakeTerms] = {}
        self.refuse: dict[str, RootgraftError | Exception] = {}
        self.num_reads: dict[Path, int] = {}
        self._read_s = read_s
        self._bind_s = bind_s

    def write(self, name: str, terms: FakeTerms | None = None) -> Path:
        path = Path(name)
        self.files[path] = terms or FakeTerms(f"sha256:{name}")
        return path

    def read(self, path: Path) -> FakeTerms:
        self.clock.advance(self._read_s)
        self.num_reads[path] = self.num_reads.get(path, 0) + 1
        terms = self.files.get(path)
        if terms is None:
            raise CheckpointError(f"There is no adapter in {path}.")
        self._may_refuse(f"read {terms.digest}")
        return terms

    def compose(self, parts: Sequence[tuple[FakeTerms, float]]) -> FakeTerms:
        digest = " + ".join(f"{scale} * {terms.digest}" for terms, scale in parts)
        return replace(parts[0][0], digest=digest, num_bytes=sum(terms.num_bytes for terms, _ in parts))

    def bind(self, terms: FakeTerms) -> FakeBound:
        self.clock.advance(self._bind_s)
        self._may_refuse(f"bind {terms.digest}")
        return FakeBound(terms.digest, terms.num_bytes if terms.bound_bytes is None else terms.bound_bytes)

    def _may_refuse(self, what: str) -> None:
        if what in self.refuse:
            raise self.refuse[what]


class ManualWork:
    """A WorkQueue that works when the test says so, or at once."""

    def __init__(self, *, at_once: bool = False) -> None:
        self.at_once = at_once
        self.queued: list[Callable[[], None]] = []
        self.closed = False

    def submit(self, work: Callable[[], None], /) -> None:
        if self.at_once:
            work()
        else:
            self.queued.append(work)

    def work(self) -> None:
        """Do all that is queued."""
        while self.queued:
            self.queued.pop(0)()

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        self.closed = True


def make_manager(
    adapters: FakeAdapters,
    work: ManualWork | None = None,
    *,
    memory_bytes: int = 10**9,
    max_loras: int = 2,
    max_cpu_loras: int | None = None,
    patience_s: float = 1.0,
    binds_in_place: bool = False,
) -> LoraManager:
    config = LoraConfig(max_loras=max_loras, max_cpu_loras=max_cpu_loras, lora_patience_s=patience_s)
    hold, bind = (adapters.bind, _itself) if binds_in_place else (_itself, adapters.bind)
    source = LoraSource(adapters.read, adapters.compose, hold, bind, binds_in_place)
    return LoraManager(
        config, source, memory_bytes=memory_bytes, work=work or ManualWork(at_once=True), clock=adapters.clock
    )


def settle(manager: LoraManager, work: ManualWork | None = None, *, limit: int = 100) -> None:
    """Load until there is nothing left to load."""
    for _ in range(limit):
        assert not manager.advance()
        if work is not None:
            work.work()
        if not manager.loader.num_in_flight:
            break


def _itself(held: Any) -> Any:
    return held

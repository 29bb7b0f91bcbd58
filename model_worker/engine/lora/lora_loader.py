"""Loading adapters beside the engine's thread."""

from __future__ import annotations

import logging
import queue
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from model_worker.engine.freed_memory import return_freed_memory
from model_worker.engine.lora.lora_entry import Held, Loaded, LoraEntry
from model_worker.engine.lora.lora_source import LoraSource, Terms
from model_worker.engine.lora.variant import Bound
from registry.errors import CheckpointError, InternalError, RootgraftError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class LoadResult:
    """What became of a load.

    Attributes:
        loaded, bound: what was made; None: it was not asked for, or failed.
        bind_s: that binding took.
        error: why it failed.
    """

    entry: LoraEntry
    loaded: Loaded | None = None
    bound: Bound | None = None
    bind_s: float = 0.0
    error: RootgraftError | None = None


class WorkQueue(Protocol):
    """One thread that does one thing after the other (see loader_thread.py); a fake in tests."""

    def submit(self, work: Callable[[], None], /) -> object: ...

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None: ...


class LoraLoader:
    """Loads entries in the order in which they are given to it.

    `start` and `results` are for one thread, the engine's; everything that entries hold is changed there.

    Attributes:
        on_result: called on the loader's thread when there is something for `results`.
    """

    def __init__(self, source: LoraSource, work: WorkQueue, *, clock: Callable[[], float] = time.perf_counter) -> None:
        self.on_result: Callable[[], None] = _nobody_waits
        self.num_in_flight = 0
        self._source = source
        self._work = work
        self._clock = clock
        self._results: queue.SimpleQueue[LoadResult] = queue.SimpleQueue()

    def start(self, entry: LoraEntry, *, bind: bool) -> None:
        """Bring an entry into host memory, unless it is there, and bind it if wanted."""
        assert not entry.in_flight
        entry.in_flight = True
        self.num_in_flight += 1
        held, digest = entry.held, entry.variant.digest
        parts = [(part.path, part.variant.digest, scale) for part, scale in entry.parts]

        def read() -> Terms:
            if not parts:
                return self._read(entry.path, digest)
            return self._source.compose([(self._read(path, digest), scale) for path, digest, scale in parts])

        def work() -> None:
            self._results.put(self._load(entry, held, read, bind=bind))
            self.on_result()

        self._work.submit(work)

    def results(self) -> list[LoadResult]:
        """What has been loaded since the last call."""
        results = []
        while not self._results.empty():
            results.append(self._results.get())
            results[-1].entry.in_flight = False
            self.num_in_flight -= 1
        return results

    def wait(self) -> None:
        """Until there is something for `results`, if something is under way."""
        if self.num_in_flight:
            self._results.put(self._results.get())  # the order does not matter

    def return_memory(self) -> None:
        """Give what entries have left back to the system, after what is being loaded."""
        self._work.submit(return_freed_memory)

    def close(self) -> None:
        self._work.shutdown(wait=False, cancel_futures=True)

    def _load(self, entry: LoraEntry, held: Held | None, read: Callable[[], Terms], *, bind: bool) -> LoadResult:
        if entry.removed and not entry.used:  # given up in the meantime
            return LoadResult(entry)
        loaded = bound = None
        bind_s = 0.0
        try:
            if held is None:
                start_s = self._clock()
                terms = read()
                held = self._source.hold(terms)
                seconds = self._clock() - start_s
                loaded = Loaded(held, terms.digest, terms.max_rank, terms.adds_only, terms.num_extra_tokens, seconds)
            if bind:
                start_s = self._clock()
                bound = self._source.bind(held)
                bind_s = self._clock() - start_s
        except RootgraftError as error:
            return LoadResult(entry, error=error)
        except Exception as error:  # a bug, or no memory: it ends this adapter, not the server
            logger.exception("Adapter %s could not be loaded.", entry.name)
            return LoadResult(
                entry,
                error=InternalError(f"Adapter {entry.name} could not be loaded ({type(error).__name__}); see the log."),
            )
        return LoadResult(entry, loaded, bound, bind_s)

    def _read(self, path: Path, digest: str) -> Terms:
        """Read an adapter whose digest is known already, or is "" for a new one."""
        terms = self._source.read(path)
        if digest and terms.digest != digest:
            raise CheckpointError(f"The files of {path} have changed since the adapter was added; add it again.")
        return terms


def _nobody_waits() -> None:
    pass

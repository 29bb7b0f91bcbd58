"""What went wrong with variants on workers, and when it is worth another try. Pure Python, an injected clock."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from controller.workers import Worker
from registry.errors import CheckpointError, RootgraftError, UnsupportedModelError

FIRST_PAUSE_S, MAX_PAUSE_S = 1.0, 300.0
MAX_PAUSE_AFTER_READING_S = 86400.0
"""Files that were read and found wrong are read again only a few times: a copy that goes on may be complete soon, and
until then twice as long as it has taken so far is no long time."""

_FOUND_WRONG = (CheckpointError, UnsupportedModelError)


@dataclass(frozen=True, slots=True)
class Failure:
    """Attributes:
    num_tries: that failed, one after the other.
    retry_at: clock time, seconds.
    """

    error: RootgraftError
    num_tries: int
    retry_at: float


class Failures:
    """The last failure of each variant on each worker. The n-th one in a row is followed by a pause of

        min(FIRST_PAUSE_S · 2ⁿ⁻¹, MAX_PAUSE_S, or MAX_PAUSE_AFTER_READING_S where the files are at fault)

    A worker that registers again is another object and starts without failures: it may have been mended.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._of_worker: WeakKeyDictionary[Worker, dict[str, Failure]] = WeakKeyDictionary()

    def note(self, worker: Worker, name: str, error: RootgraftError) -> None:
        failures = self._of_worker.setdefault(worker, {})
        before = failures.get(name)
        num_tries = 1 if before is None else before.num_tries + 1
        max_pause_s = MAX_PAUSE_AFTER_READING_S if isinstance(error, _FOUND_WRONG) else MAX_PAUSE_S
        pause_s = min(FIRST_PAUSE_S * 2.0 ** min(num_tries - 1, 32), max_pause_s)
        failures[name] = Failure(error, num_tries, self._clock() + pause_s)

    def forget(self, worker: Worker, name: str) -> None:
        self._of_worker.get(worker, {}).pop(name, None)

    def forget_all(self, name: str) -> None:
        """Try at once again on all workers: the variant is another one from now on."""
        for failures in self._of_worker.values():
            failures.pop(name, None)

    def of(self, worker: Worker, name: str) -> Failure | None:
        return self._of_worker.get(worker, {}).get(name)

    def is_due(self, worker: Worker, name: str) -> bool:
        """Whether a step for it may be tried now."""
        failure = self.of(worker, name)
        return failure is None or self._clock() >= failure.retry_at

    def retry_in_s(self, failure: Failure) -> float:
        return max(0.0, failure.retry_at - self._clock())

    def keep_only(self, worker: Worker, names: set[str]) -> None:
        """Forget what happened with variants that nobody speaks of any more."""
        failures = self._of_worker.get(worker, {})
        for name in failures.keys() - names:
            del failures[name]

"""How fast the waiting queue moves. Pure Python; takes a clock."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

_NUM_STARTS = 64  # the pace is that of so many last starts
_MIN_WAIT_S, _MAX_WAIT_S = 1.0, 600.0


class QueuePace:
    """Tells a request that finds the queue full when to come back.

    Measured is the mean time between two starts of waiting requests, since the queue was last empty. A request that
    is refused is told that time, times the number of those refused before it for whom no place has become free yet: so
    they come back one after the other, and not all at once.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._times: deque[float] = deque(maxlen=_NUM_STARTS)  # when the queue began to fill, then starts
        self._num_refused = 0

    def queue_begins(self) -> None:
        """A request waits, and none did before."""
        self._times.clear()
        self._times.append(self._clock())
        self._num_refused = 0

    def one_starts(self) -> None:
        self._times.append(self._clock())
        self._num_refused = max(0, self._num_refused - 1)

    def refuse(self) -> float:
        """Seconds after which the refused request may find a place."""
        self._num_refused += 1
        elapsed_s = self._clock() - self._times[0] if self._times else 0.0
        wait_s = self._num_refused * elapsed_s / max(1, len(self._times) - 1)
        return min(max(wait_s, _MIN_WAIT_S), _MAX_WAIT_S)

"""A bounded number of places for requests, and when a request that finds none may come back. Pure Python."""

from __future__ import annotations

_MIN_WAIT_S, _MAX_WAIT_S = 1.0, 600.0


class Places:
    """Places that requests take and leave.

    While all are taken, one becomes free every `mean / max_taken` seconds, where a request keeps its place for `mean`
    seconds (Little's law). A request that is refused is told that time, times the number of those refused before it for
    whom no place has become free yet: so they come back one after the other, and not all at once.
    """

    __slots__ = ("_max_taken", "_num_refused", "num_taken")

    def __init__(self, max_taken: int) -> None:
        self.num_taken = 0
        self._max_taken = max_taken
        self._num_refused = 0

    @property
    def all_taken(self) -> bool:
        return self.num_taken >= self._max_taken

    def take(self) -> None:
        assert not self.all_taken
        self.num_taken += 1

    def leave(self) -> None:
        self.num_taken -= 1
        self._num_refused = max(0, self._num_refused - 1)

    def refuse(self, mean_s: float | None) -> float | None:
        """Seconds after which the refused request may find a place; None where it is not known.

        Args:
            mean_s: how long a request keeps its place; None: not measured.
        """
        self._num_refused += 1
        if mean_s is None:
            return None
        return min(max(self._num_refused * mean_s / self._max_taken, _MIN_WAIT_S), _MAX_WAIT_S)

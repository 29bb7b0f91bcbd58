"""Progress of long steps as a few lines of text."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

Report = Callable[[str], None]
"""Called with each line of progress."""


class TenthsProgress(ABC):
    """Call it with what is done and what is to be done in all; it reports a line at each tenth of the way."""

    def __init__(self, stage: str, report: Report) -> None:
        self._stage = stage
        self._report = report
        self._tenths = 0

    def __call__(self, done: int, total: int) -> None:
        tenths = 10 if total == 0 else done * 10 // total
        if tenths > self._tenths:
            self._tenths = tenths
            self._report(f"{self._stage}: {self.describe(done, total, 10 * tenths)}")

    @abstractmethod
    def describe(self, done: int, total: int, percent: int) -> str:
        """How far it is; `percent` is in whole tenths."""


class ByteProgress(TenthsProgress):
    """Of bytes."""

    def describe(self, done: int, total: int, percent: int) -> str:
        return f"{percent} % of {total / 1e6:.1f} MB"


class CountProgress(TenthsProgress):
    """Of things that are counted."""

    def describe(self, done: int, total: int, percent: int) -> str:
        return f"{done} of {total}"

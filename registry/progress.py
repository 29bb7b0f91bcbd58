"""Progress of long steps as a few lines of text."""

from __future__ import annotations

from collections.abc import Callable

Report = Callable[[str], None]
"""Called with each line of progress."""


class ByteProgress:
    """Call it with the bytes done and the bytes in all; it reports a line at each tenth of the way."""

    def __init__(self, stage: str, report: Report) -> None:
        self._stage = stage
        self._report = report
        self._tenths = 0

    def __call__(self, done: int, total: int) -> None:
        tenths = 10 if total == 0 else done * 10 // total
        if tenths > self._tenths:
            self._tenths = tenths
            self._report(f"{self._stage}: {tenths * 10} % of {total / 1e6:.1f} MB")


class CountProgress:
    """Call it with the number of things done and of all; it reports a line at each tenth of the way."""

    def __init__(self, stage: str, report: Report) -> None:
        self._stage = stage
        self._report = report
        self._tenths = 0

    def __call__(self, done: int, total: int) -> None:
        tenths = 10 if total == 0 else done * 10 // total
        if tenths > self._tenths:
            self._tenths = tenths
            self._report(f"{self._stage}: {done} of {total}")

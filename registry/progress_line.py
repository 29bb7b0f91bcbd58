"""Progress of long steps on a terminal, or as a few lines in a log."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TextIO


class ProgressLine:
    """Call it with a stage, the bytes done and the bytes in all.

    On a terminal one line is rewritten a few times a second; elsewhere a line is printed at each quarter of a stage.
    """

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream
        self._clock = clock
        self._is_terminal = stream.isatty()
        self._shown: tuple[str, int] | None = None
        self._shown_at = 0.0

    def __call__(self, stage: str, done: int, total: int) -> None:
        percent = 100 if total == 0 else done * 100 // total
        state = (stage, percent if self._is_terminal else percent // 25)
        ended = done >= total
        too_soon = self._is_terminal and not ended and self._clock() - self._shown_at < 0.1
        if state == self._shown or too_soon:
            return
        self._shown, self._shown_at = state, self._clock()
        text = f"{stage}: {percent} % of {total / 1e6:.1f} MB"
        if not self._is_terminal:
            self._stream.write(f"{text}\n")
        else:
            self._stream.write(f"\r\x1b[K{text}" + ("\n" if ended else ""))
        self._stream.flush()

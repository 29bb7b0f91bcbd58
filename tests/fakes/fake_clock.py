"""A clock that a test moves."""

from __future__ import annotations


class FakeClock:
    """Calling it gives the time in seconds."""

    def __init__(self, now_s: float = 0.0) -> None:
        self.now_s = now_s

    def __call__(self) -> float:
        return self.now_s

    def advance(self, delay_s: float) -> None:
        self.now_s += delay_s

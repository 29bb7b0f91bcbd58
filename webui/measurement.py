"""How fast an answer came, measured here: what the person at the browser sees."""

from __future__ import annotations

from collections.abc import Callable

from webui.client import Chunk, Usage

ENDINGS = {"length": "cut at the token limit", "stopped": "stopped", "failed": "failed"}


class Measurement:
    """Times of one answer. Begins when it is made."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._began = clock()
        self._first: float | None = None
        self._last = self._began
        self._num_chunks = 0
        self._usage: Usage | None = None
        self._ending: str | None = None

    def add(self, chunk: Chunk) -> None:
        if chunk.usage is not None:
            self._usage = chunk.usage
        if chunk.finish_reason is not None:
            self._ending = chunk.finish_reason
        if chunk.text:
            self._num_chunks += 1
            self._last = self._clock()
            if self._first is None:
                self._first = self._last

    def end(self, ending: str) -> None:
        """The answer ended before its own end: "stopped" or "failed"."""
        self._ending = ending

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens after the first over the time since the first; None: fewer than two."""
        num_tokens = self._num_tokens
        if self._first is None or num_tokens < 2 or self._last <= self._first:
            return None
        return (num_tokens - 1) / (self._last - self._first)

    def summary(self) -> str:
        """One line, in Markdown. A count with `~` is that of chunks: the server counts tokens only at the end."""
        if self._first is None and self._usage is None:
            return "" if self._ending else "Waiting for the first token …"
        about = "" if self._usage else "~"
        parts = [f"**{about}{self._num_tokens} tokens**"]
        if (rate := self.tokens_per_second) is not None:
            parts.append(f"**{rate:.1f} tokens/s**")
        if self._first is not None:
            parts.append(f"first token after {self._first - self._began:.2f} s")
        if self._usage is not None:
            parts.append(f"prompt {self._usage.prompt_tokens} tokens")
        if self._ending in ENDINGS:
            parts.append(ENDINGS[self._ending])
        return " · ".join(parts)

    @property
    def _num_tokens(self) -> int:
        return self._num_chunks if self._usage is None else self._usage.completion_tokens

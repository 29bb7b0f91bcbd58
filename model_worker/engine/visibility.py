"""Which earlier positions a layer's attention can see. Pure Python; no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Visibility:
    """The limits of a layer; layers with equal ones can share their block tables.

    Attributes:
        sliding_window: a token sees this many positions, its own included; None: all.
        chunk_size: a token sees only positions of its own chunk, [n * chunk_size, (n + 1) * chunk_size); None: all.
    """

    sliding_window: int | None = None
    chunk_size: int | None = None

    def within(self, max_model_len: int) -> Visibility:
        """The same for positions below `max_model_len`: limits that none of them reaches are left out."""
        window, chunk = self.sliding_window, self.chunk_size
        return Visibility(
            window if window is not None and window < max_model_len else None,
            chunk if chunk is not None and chunk < max_model_len else None,
        )

    @property
    def limited(self) -> bool:
        return self.sliding_window is not None or self.chunk_size is not None

    def first_visible(self, position: int) -> int:
        """The first position that the token at `position` sees; it never moves back as `position` grows."""
        first = 0
        if self.sliding_window is not None:
            first = max(first, position - self.sliding_window + 1)
        if self.chunk_size is not None:
            first = max(first, position - position % self.chunk_size)
        return first

    def max_blocks(self, num_tokens: int, *, block_size: int, max_step_tokens: int) -> int:
        """The most blocks that a sequence of `num_tokens` holds at once in layers of this kind.

        A step of n tokens that starts at position s needs [first_visible(s), s + n], the next position included. One
        more block is counted, because blocks are let go only when another one is full.
        """
        num_all = -(-num_tokens // block_size)
        spans = [limit for limit in (self.sliding_window, self.chunk_size) if limit is not None]
        if not spans:
            return num_all
        return min(num_all, (min(spans) + max_step_tokens - 2) // block_size + 3)

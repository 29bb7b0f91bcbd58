"""What the scheduler asks about variants. Pure Python; no torch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from model_worker.engine.sequence import Sequence


class VariantGate(Protocol):
    """Says which sequences may run; asked in the engine's thread only.

        wait ──► enter ──► leave        a preempted sequence waits again; one that waits may leave too
          ▲        │
          └────────┘

    Sequences without a variant may always run.
    """

    def wait(self, sequence: Sequence) -> None:
        """It is new, or does not run any more: from now on it waits, and its variant is wanted."""
        ...

    def admits(self, sequence: Sequence) -> bool:
        """A waiting sequence may enter now, as far as its variant is concerned."""
        ...

    def holds_up(self, sequence: Sequence) -> bool:
        """It has waited for its variant for so long that others may run before it only if there is room for it too."""
        ...

    def enter(self, sequence: Sequence) -> None:
        """It runs from now on, and its variant stays active until it leaves.

        It was admitted, or is forked from one that runs.
        """
        ...

    def leave(self, sequence: Sequence) -> None:
        """It has ended; without effect if it neither waited nor ran."""
        ...

    def check_integrity(self, running: Iterable[Sequence], waiting: Iterable[Sequence]) -> None:
        """Recount what is held by these, which are all there are.

        Raises:
            AssertionError: something leaked or is held twice.
        """
        ...


class OpenGate:
    """The gate of an engine without variants."""

    def wait(self, sequence: Sequence) -> None:
        pass

    def admits(self, sequence: Sequence) -> bool:
        return True

    def holds_up(self, sequence: Sequence) -> bool:
        return False

    def enter(self, sequence: Sequence) -> None:
        pass

    def leave(self, sequence: Sequence) -> None:
        pass

    def check_integrity(self, running: Iterable[Sequence], waiting: Iterable[Sequence]) -> None:
        assert all(sequence.variant is None for sequences in (running, waiting) for sequence in sequences)

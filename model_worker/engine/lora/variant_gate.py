"""What the scheduler asks about variants. Pure Python; no torch."""

from __future__ import annotations

from typing import Protocol

from model_worker.engine.sequence import Sequence


class VariantGate(Protocol):
    """Says which sequences may run; asked in the engine's thread only."""

    def enter(self, sequence: Sequence) -> bool:
        """A waiting sequence could run now. True: its variant is active, and stays so until the sequence leaves.

        False: it is not; it is wanted from now on, and the sequence will be asked about again.
        """
        ...

    def leave(self, sequence: Sequence) -> None:
        """A sequence that entered does not run any more (finished, aborted, or preempted)."""
        ...

    def holds_up(self, sequence: Sequence) -> bool:
        """It has waited for its variant for so long that no other may take its place in the batch any more."""
        ...

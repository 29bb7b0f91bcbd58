"""How close to its fine-tune a delta has to be."""

from __future__ import annotations

from dataclasses import dataclass

from delta.quality_record import Quality
from registry.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class QualityGate:
    """What is asked of a delta.

    Attributes:
        max_kl: of the mean divergence from the fine-tune, in nats a token.
        min_answers: share of the tokens of the fine-tune's own answers that are to be the same. What it learned is
            there: one other token may begin another answer, with other facts, while the mean divergence is tiny.
    """

    max_kl: float = 0.005
    min_answers: float = 0.995

    def admits(self, quality: Quality) -> bool:
        return quality.kl_mean <= self.max_kl and quality.answers >= self.min_answers


class QualityTooLowError(CheckpointError):
    """A delta is not as close to its fine-tune as was asked for."""

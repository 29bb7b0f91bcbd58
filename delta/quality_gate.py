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
        max_kl_share: of that divergence in the base's own; either of both is enough. A fine-tune that says almost the
            same as its base cannot be told from its delta by shares, nor one that says something else by nats.
        min_answers: share of the tokens of the fine-tune's own answers that are to be the same. What it learned is
            there: one other token may begin another answer, with other facts, while the mean divergence is tiny.
    """

    max_kl: float = 0.005
    max_kl_share: float = 0.01
    min_answers: float = 0.995

    def admits(self, quality: Quality) -> bool:
        return quality.kl_mean <= self._max_kl(quality) and quality.answers >= self.min_answers

    def asks_for(self, quality: Quality) -> str:
        """The bounds beside which `quality` is held, for people."""
        return f"at most {self._max_kl(quality):.4g} nats and at least {self.min_answers:.1%}"

    def _max_kl(self, quality: Quality) -> float:
        return max(self.max_kl, self.max_kl_share * (quality.base_kl_mean or 0.0))


class QualityTooLowError(CheckpointError):
    """A delta is not as close to its fine-tune as was asked for."""

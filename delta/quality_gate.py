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
    """

    max_kl: float = 0.005
    max_kl_share: float = 0.1

    def admits(self, quality: Quality) -> bool:
        share = 0.0 if quality.base_kl_mean is None else self.max_kl_share
        return quality.kl_mean <= max(self.max_kl, share * (quality.base_kl_mean or 0.0))


class QualityTooLowError(CheckpointError):
    """A delta is not as close to its fine-tune as was asked for."""

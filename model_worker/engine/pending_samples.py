"""Samples that are being drawn: what a step that is launched leaves behind, until its result is wanted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from model_worker.engine.outputs import SampledToken
from registry.errors import InternalError, InvalidRequestError, RootgraftError


class PendingSamples(Protocol):
    """One sample for each row of a step's logits.

    Attributes:
        tokens: [R] int64 on the device of the logits; some token of the vocabulary in rows that end in an error.
            Whatever is launched afterwards may read them.
    """

    @property
    def tokens(self) -> Tensor: ...

    def finish(self) -> list[SampledToken | RootgraftError]:
        """[R] See `Sampler.sample`. Waits until they are on the host; nothing that was launched later is waited for."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class FinishedSamples:
    """Samples that are there already. See `PendingSamples`."""

    tokens: Tensor
    samples: list[SampledToken | RootgraftError]

    def finish(self) -> list[SampledToken | RootgraftError]:
        return self.samples


def model_failed() -> InternalError:
    """Of a row whose logits, as the model gave them, have NaN or +inf or nothing finite."""
    return InternalError(
        "The model produced logits that are not finite, which usually means that float16 overflowed; "
        "load it with --dtype bfloat16 or float32."
    )


def everything_forbidden() -> InvalidRequestError:
    """Of a row in which the request's own settings left nothing to draw."""
    return InvalidRequestError(
        "min_tokens, the stop token ids, logit_bias and the penalties together forbid every token; relax one of them."
    )

"""What the sampler has to know of a sequence. Pure Python; no torch."""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from typing import Protocol

from model_worker.engine.sampling_params import SamplingParams


class SampledRow(Protocol):
    """One row of logits is sampled for it: a sequence, or one with drafts after its tokens.

    Attributes:
        sampling: of its request.
        seed: of the sequence's own random stream.
        num_tokens: of prompt and output; also the position of the token that is drawn.
        num_output_tokens: of the output.
        output_counts: how often each token id is in the output.
        prompt_unique_ids: the distinct ids of the prompt, 64-bit.
    """

    @property
    def sampling(self) -> SamplingParams: ...

    @property
    def seed(self) -> int: ...

    @property
    def num_tokens(self) -> int: ...

    @property
    def num_output_tokens(self) -> int: ...

    @property
    def output_counts(self) -> Mapping[int, int]: ...

    @property
    def prompt_unique_ids(self) -> array[int]: ...

"""Rows of a step whose variants have more tokens than the base: their logits are wider, so they are sampled apart.

    logits of all samples [S, V] ──► those of the base's vocabulary [., V], of one with E tokens more [., V + E], …

Nothing is masked, and what a row draws does not depend on the vocabularies beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from model_worker.engine.ops.low_rank import to_device
from model_worker.engine.outputs import SampledToken
from model_worker.engine.pending_samples import PendingSamples
from model_worker.engine.sampled_row import SampledRow
from model_worker.engine.sampler import Sampler
from registry.errors import RootgraftError


class ExtraLogits(NamedTuple):
    """Of the rows [start, end) of a step's logits, for the tokens that their variant has beyond the base's vocabulary.

    Attributes:
        logits: [end - start, E]
    """

    start: int
    end: int
    logits: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class SamplesByVocabulary:
    """See `PendingSamples`.

    Attributes:
        groups: places of samples, and these.
    """

    tokens: Tensor
    groups: Sequence[tuple[list[int], PendingSamples]]

    def finish(self) -> list[SampledToken | RootgraftError]:
        drawn = {
            place: sample
            for places, samples in self.groups
            for place, sample in zip(places, samples.finish(), strict=True)
        }
        return [drawn[place] for place in range(len(drawn))]


def sample_by_vocabulary(
    sampler: Sampler,
    logits: Tensor,
    extra: Sequence[ExtraLogits],
    rows: npt.NDArray[np.int64],
    sampled: Sequence[SampledRow],
) -> SamplesByVocabulary:
    """As `Sampler.launch`, with as many passes as there are sizes of vocabularies.

    Args:
        logits: [S, V] of the base's tokens.
        rows: [S] of the step's logits, which `extra` is about.
        sampled: [S]
    """
    device = logits.device
    in_base = np.ones(len(rows), dtype=bool)
    wider: dict[int, list[tuple[npt.NDArray[np.int64], Tensor]]] = {}  # by E: samples [n], their extra logits [n, E]
    for start, end, of_rows in extra:
        samples = np.flatnonzero((start <= rows) & (rows < end))
        in_base[samples] = False
        wider.setdefault(of_rows.shape[1], []).append((samples, of_rows[_index(rows[samples] - start, device)]))
    tokens = torch.empty(len(rows), dtype=torch.int64, device=device)
    groups: list[tuple[list[int], PendingSamples]] = []

    def launch(samples: npt.NDArray[np.int64], of_group: Tensor, index: Tensor) -> None:
        places = samples.tolist()
        drawn = sampler.launch(of_group, [sampled[place] for place in places])
        tokens[index] = drawn.tokens
        groups.append((places, drawn))

    (rest,) = in_base.nonzero()
    launch(rest, logits[index := _index(rest, device)], index)
    for parts in wider.values():
        samples = np.concatenate([samples for samples, _ in parts])
        index = _index(samples, device)
        launch(samples, torch.cat([logits[index], torch.cat([more for _, more in parts])], dim=1), index)
    return SamplesByVocabulary(tokens, groups)


def _index(numbers: npt.NDArray[np.int64], device: torch.device) -> Tensor:
    return to_device(torch.from_numpy(numbers), device)

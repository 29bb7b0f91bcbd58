"""Rows of a step whose variants have more tokens than the base: their logits are wider, so they are sampled apart.

    logits of all samples [S, V] ──► those of the base's vocabulary [., V], of one with E tokens more [., V + E], …

Nothing is masked, and what a row draws does not depend on the vocabularies beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from model_worker.engine.outputs import SampledToken
from model_worker.engine.pending_samples import FinishedSamples
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


def sample_by_vocabulary(
    sampler: Sampler,
    logits: Tensor,
    extra: Sequence[ExtraLogits],
    rows: npt.NDArray[np.int64],
    sampled: Sequence[SampledRow],
) -> FinishedSamples:
    """As `Sampler.launch`, but waits for the samples, with as many passes as there are sizes of vocabularies.

    Args:
        logits: [S, V] of the base's tokens.
        rows: [S] of the step's logits, which `extra` is about.
        sampled: [S]
    """
    in_base = np.ones(len(rows), dtype=bool)
    wider: dict[int, list[tuple[npt.NDArray[np.int64], Tensor]]] = {}  # by E: samples [n], logits [n, V + E]
    for start, end, of_rows in extra:
        samples = np.flatnonzero((start <= rows) & (rows < end))
        in_base[samples] = False
        of_samples = of_rows[torch.from_numpy(rows[samples] - start).to(logits.device)]
        mine = logits[torch.from_numpy(samples).to(logits.device)]
        wider.setdefault(of_rows.shape[1], []).append((samples, torch.cat([mine, of_samples], dim=1)))
    (rest,) = in_base.nonzero()
    groups = [(rest, logits[torch.from_numpy(rest).to(logits.device)])]
    for parts in wider.values():
        groups.append((np.concatenate([samples for samples, _ in parts]), torch.cat([wide for _, wide in parts])))
    drawn: dict[int, SampledToken | RootgraftError] = {}
    for samples, of_group in groups:
        places = samples.tolist()
        drawn.update(zip(places, sampler.sample(of_group, [sampled[place] for place in places]), strict=True))
    found = [drawn[place] for place in range(len(sampled))]
    token_ids = [sample.token_id if isinstance(sample, SampledToken) else 0 for sample in found]
    return FinishedSamples(torch.tensor(token_ids, device=logits.device), found)

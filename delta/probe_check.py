"""Whether a loaded delta answers its probe as it should. Pure Python; no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from delta.quality_record import Probe, ProbeCase

# The probe's tolerance allows for bfloat16; weights of fewer bits change more.
_TOLERANCE_FACTORS: Mapping[str, float] = {"int8": 2, "int4": 6}


def probe_tolerance(probe: Probe, weights: str) -> float:
    """The largest difference of a log probability with which the probe is passed by a model with these weights."""
    return probe.tolerance * _TOLERANCE_FACTORS.get(weights, 1)


def failed_cases(probe: Probe, answers: Sequence[Mapping[int, float]], weights: str) -> list[str]:
    """Why each case that failed did so; empty: the probe is passed.

    Args:
        answers: for each case the log probabilities of possible next tokens: at least those of the likeliest ones, a
            few more of them than the case names.
        weights: of the base as it is served: "int8", "int4", or a dtype of torch.
    """
    assert len(answers) == len(probe.cases)
    tolerance = probe_tolerance(probe, weights)
    found = (_failure(case, answer, tolerance) for case, answer in zip(probe.cases, answers, strict=True))
    return [failure for failure in found if failure is not None]


def _failure(case: ProbeCase, answer: Mapping[int, float], tolerance: float) -> str | None:
    for token_id, expected in zip(case.top_token_ids, case.top_logprobs, strict=True):
        logprob = answer.get(token_id, -math.inf)
        if not abs(logprob - expected) <= tolerance:  # a NaN fails too
            shown = "is not among the likeliest" if logprob == -math.inf else f"has {logprob:.3f}"
            return (
                f"after {case.prompt!r:.60} token {token_id} should have the log probability {expected:.3f} "
                f"within {tolerance:g}, but {shown}"
            )
    return None

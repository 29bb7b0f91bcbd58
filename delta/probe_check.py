"""Whether a loaded delta answers its probe as it should. Pure Python; no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from delta.quality_record import Probe, ProbeCase

# The probe's tolerance allows for bfloat16; weights of fewer bits change more.
_TOLERANCE_FACTORS: Mapping[str, float] = {"int8": 2, "int4": 6}


def probe_tolerance(probe: Probe, weights: str) -> float:
    """The largest difference of a log probability with which the probe is passed by a model with these weights."""
    return probe.tolerance * _TOLERANCE_FACTORS.get(weights, 1)


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """Attributes:
    max_difference: the largest of a log probability from the expected one; infinite where a token was none of the
        likeliest.
    tolerance: with which a case is passed.
    failures: why each case that failed did so; empty: the probe is passed.
    """

    max_difference: float
    tolerance: float
    failures: tuple[str, ...]


def check_probe(probe: Probe, answers: Sequence[Mapping[int, float]], weights: str) -> ProbeResult:
    """Compare the answers with those that are expected.

    Args:
        answers: for each case the log probabilities of possible next tokens: at least those of the likeliest ones, a
            few more of them than the case names.
        weights: of the base as it is served: "int8", "int4", or a dtype of torch.
    """
    assert len(answers) == len(probe.cases)
    tolerance = probe_tolerance(probe, weights)
    max_difference, failures = 0.0, []
    for case, answer in zip(probe.cases, answers, strict=True):
        differences = [
            _difference(answer, *expected) for expected in zip(case.top_token_ids, case.top_logprobs, strict=True)
        ]
        max_difference = max(max_difference, *differences)
        failed = next((place for place, difference in enumerate(differences) if difference > tolerance), None)
        if failed is not None:
            failures.append(_failure(case, failed, answer, tolerance))
    return ProbeResult(max_difference, tolerance, tuple(failures))


def _difference(answer: Mapping[int, float], token_id: int, expected: float) -> float:
    difference = abs(answer.get(token_id, -math.inf) - expected)
    return math.inf if math.isnan(difference) else difference


def _failure(case: ProbeCase, place: int, answer: Mapping[int, float], tolerance: float) -> str:
    token_id, expected = case.top_token_ids[place], case.top_logprobs[place]
    shown = f"has {answer[token_id]:.3f}" if token_id in answer else "is not among the likeliest"
    return (
        f"after {case.prompt!r:.60} token {token_id} should have the log probability {expected:.3f} "
        f"within {tolerance:g}, but {shown}"
    )

from __future__ import annotations

import math

import pytest

from delta.probe_check import check_probe, probe_tolerance
from delta.quality_record import Probe, ProbeCase

PROBE = Probe((ProbeCase("Who?", (1, 2), (7, 3), (-0.5, -1.5)), ProbeCase("What?", (4,), (5,), (-0.1,))), 0.2)
RIGHT = [{7: -0.6, 3: -1.4, 9: -3.0}, {5: -0.1}]


def test_right_answers_pass() -> None:
    assert check_probe(PROBE, RIGHT, "float32").failures == ()


@pytest.mark.parametrize("logprob", [-0.75, -0.25, math.nan, math.inf, -math.inf])
def test_another_probability_fails(logprob: float) -> None:
    (failure,) = check_probe(PROBE, [{7: logprob, 3: -1.5}, {5: -0.1}], "float32").failures
    assert "'Who?'" in failure
    assert "token 7" in failure


def test_a_token_that_is_not_likely_at_all_fails() -> None:
    (failure,) = check_probe(PROBE, [RIGHT[0], {1: -0.1}], "float32").failures
    assert "not among the likeliest" in failure


def test_coarser_weights_are_given_more() -> None:
    assert probe_tolerance(PROBE, "bfloat16") == probe_tolerance(PROBE, "float32") == 0.2
    assert probe_tolerance(PROBE, "int4") > probe_tolerance(PROBE, "int8") > 0.2

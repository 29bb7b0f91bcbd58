from __future__ import annotations

import pytest

from delta.codecs.policy import CodecPolicy


def test_every_step_of_the_ladder_is_finer_and_the_last_is_exact() -> None:
    steps = [CodecPolicy("auto")]
    while (finer := steps[-1].finer()) is not None:
        steps.append(finer)
    assert [(step.codec, step.residuals, step.rank) for step in steps] == [
        ("auto", (), 16),
        ("auto", ("lowrank",), 16),
        ("auto", ("sign", "lowrank"), 16),
        ("auto", ("sign", "sign", "lowrank"), 32),
        ("auto", ("sign", "sign", "sign", "lowrank"), 64),
        ("dense", (), 16),
    ]


def test_a_larger_rank_is_kept() -> None:
    finer = CodecPolicy("sign", rank=24).finer()
    assert finer == CodecPolicy("sign", ("lowrank",), 24)
    assert finer.finer() == CodecPolicy("sign", ("sign", "lowrank"), 24)


@pytest.mark.parametrize("policy", [CodecPolicy("lowrank"), CodecPolicy(residuals=("lowrank", "lowrank"))])
def test_what_is_beside_the_ladder_becomes_exact(policy: CodecPolicy) -> None:
    assert policy.finer() == CodecPolicy("dense")


@pytest.mark.parametrize("codec", ["lossless", "sparse", "dense"])
def test_exact_codecs_have_nothing_finer(codec: str) -> None:
    assert CodecPolicy(codec).finer() is None  # type: ignore[arg-type]


def test_auto_gives_tables_no_low_rank_residual() -> None:
    residuals = ("sign", "lowrank")
    assert CodecPolicy("auto", residuals, 32).of_tables() == CodecPolicy("auto", ("sign",), 32)
    assert CodecPolicy("sign", residuals).of_tables() == CodecPolicy("sign", residuals)

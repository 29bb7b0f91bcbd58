"""Deltas that are added while a model is loaded."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from adapters.load_plan import LoadPlan
from adapters.weights import iterate_weights
from delta.apply import apply_delta
from delta.codecs.policy import CodecPolicy
from delta.same_bits import same_bits
from registry.checkpoint import read_checkpoint
from registry.errors import CheckpointError, UnsupportedModelError
from tests.delta.models import DENSE, LOSSLESS, SIGN, base_weights, make, save, tuned_weights
from tests.fakes.load_plans import make_plan


def _plan(base: Path, *deltas: Path) -> LoadPlan:
    return dataclasses.replace(make_plan(), path=base, checkpoint=read_checkpoint(base), deltas=deltas)


def _equal(left: dict[str, object], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(same_bits(left[name], right[name]) for name in right)  # type: ignore[arg-type]


def test_one_gives_its_fine_tune_back(tmp_path: Path, base: Path, target: Path, delta: Path) -> None:
    assert _equal(dict(iterate_weights(_plan(base))), base_weights())
    assert _equal(dict(iterate_weights(_plan(base, delta))), load_file(target / "model.safetensors"))
    make(base, target, tmp_path / "lossy", SIGN)
    apply_delta(base, tmp_path / "lossy", tmp_path / "back")
    expected = load_file(tmp_path / "back" / "model.safetensors")
    assert _equal(dict(iterate_weights(_plan(base, tmp_path / "lossy"))), expected)


@pytest.mark.parametrize("policy", [LOSSLESS, DENSE, CodecPolicy("sparse")], ids=lambda policy: policy.codec)
def test_several_add_up(tmp_path: Path, base: Path, policy: CodecPolicy) -> None:
    deltas = []
    for row in (1, 2):
        weights = base_weights()
        weights["up"][row] += 0.5
        weights["norm"][row] = 3
        make(base, save(tmp_path / f"target{row}", weights), tmp_path / f"delta{row}", policy)
        deltas.append(tmp_path / f"delta{row}")
    both = dict(iterate_weights(_plan(base, *deltas)))
    expected = base_weights()
    expected["up"][1:3] += 0.5
    expected["norm"][1:3] = 3
    assert _equal(both, expected)


def test_integers_do_not_add_up(base: Path, delta: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="'table', a tensor of integers"):
        list(iterate_weights(_plan(base, delta, delta)))


@pytest.mark.parametrize("change", ["changed", "missing", "extra"])
def test_another_base_is_refused(tmp_path: Path, delta: Path, change: str) -> None:
    weights = base_weights()
    if change == "changed":
        weights["embed"][0, 0] += 1
    elif change == "missing":
        del weights["embed"]
    else:
        weights["more"] = torch.zeros(1)
    other = save(tmp_path / "other", weights)
    with pytest.raises(CheckpointError, match="another base model"):
        list(iterate_weights(_plan(other, delta)))


def test_tied_copies_follow_their_table(tmp_path: Path) -> None:
    weights = base_weights()
    base = save(tmp_path / "base", weights | {"head": weights["embed"].clone()})
    tuned = tuned_weights()
    tuned["embed"] *= 2
    make(base, save(tmp_path / "target", tuned), tmp_path / "delta")
    loaded = dict(iterate_weights(_plan(base, tmp_path / "delta")))
    assert _equal(loaded, tuned | {"head": tuned["embed"]})


def test_what_the_base_has_no_place_for_is_refused(tmp_path: Path, base: Path) -> None:
    longer = base_weights()
    longer["embed"] = torch.cat([longer["embed"], torch.ones(2, 8).bfloat16()])
    more = tuned_weights() | {"head": torch.ones(20, 8)}
    for name, weights, message in (("longer", longer, "gives back embed,"), ("more", more, "gives back head,")):
        make(base, save(tmp_path / name, weights), tmp_path / f"delta-{name}")
        with pytest.raises(UnsupportedModelError, match=rf"{message}.*delta apply"):
            list(iterate_weights(_plan(base, tmp_path / f"delta-{name}")))


def test_damage_is_noticed(base: Path, delta: Path) -> None:
    file = delta / "delta.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged"):
        list(iterate_weights(_plan(base, delta)))

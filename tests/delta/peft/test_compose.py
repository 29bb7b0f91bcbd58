"""Several adapters with weights are one variant that computes their sum."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from torch.nn import functional

from delta.merge_terms import merge_linear
from delta.peft.compose import compose
from delta.peft.reader import read_peft_adapter
from delta.variant_terms import LinearTerms, SignPlane, SparseMatrix, VariantTerms
from registry.errors import InvalidRequestError
from tests.fakes.peft_adapters import TinyBase, make_adapter, merged_model
from tests.fakes.tiny_models import build_tiny_model

_CONFIGS = {
    "a": LoraConfig(r=4, target_modules=["q_proj"], target_parameters=["experts.down_proj"]),
    "b": LoraConfig(r=3, target_modules=["q_proj", "v_proj", "embed_tokens"], lora_alpha=5),
    "c": LoraConfig(r=2, target_modules=["o_proj"], target_parameters=["gate_up_proj", "experts.down_proj"]),
    "dora": LoraConfig(r=2, target_modules=["o_proj"], use_dora=True),
    "whole": LoraConfig(r=2, target_modules=["o_proj"], modules_to_save=["model.norm"]),
}


@pytest.fixture(scope="module")
def base() -> TinyBase:
    return TinyBase(build_tiny_model("qwen3_moe"))


@pytest.fixture(scope="module")
def adapters(base: TinyBase, tmp_path_factory: pytest.TempPathFactory) -> dict[str, VariantTerms]:
    root: Path = tmp_path_factory.mktemp("adapters")
    model = build_tiny_model("qwen3_moe")
    for seed, (name, config) in enumerate(_CONFIGS.items()):
        make_adapter(model, config, root / name, seed=seed)
    return {name: read_peft_adapter(root / name, base) for name in _CONFIGS}


def test_a_composition_changes_each_weight_by_the_weighted_sum(adapters: dict[str, VariantTerms]) -> None:
    weights = {"a": 0.5, "b": -1.25, "c": 2.0}
    composed = compose([(adapters[name], weight) for name, weight in weights.items()])
    model = build_tiny_model("qwen3_moe")
    base = dict(model.named_parameters())
    alone = {name: dict(merged_model(model, adapters[name]).named_parameters()) for name in weights}
    for name, merged in merged_model(model, composed).named_parameters():
        expected = base[name] + sum(weight * (alone[part][name] - base[name]) for part, weight in weights.items())
        torch.testing.assert_close(merged, expected, atol=1e-5, rtol=0)
    assert composed.max_rank == 4 + 3
    assert composed.adds_only


def test_biases_and_whole_matrices_add_up() -> None:
    first = LinearTerms(dense=torch.ones(2, 3), bias=torch.tensor([1.0, 2.0]))
    second = LinearTerms(bias=torch.tensor([4.0, 8.0]))
    parts = [VariantTerms(digest, {"m": terms}) for digest, terms in (("sha256:1", first), ("sha256:2", second))]
    weight, bias = merge_linear(torch.zeros(2, 3), None, compose([(parts[0], 0.5), (parts[1], 2)]).linears["m"])
    assert bias is not None
    assert weight.tolist() == [[0.5] * 3] * 2
    assert bias.tolist() == [8.5, 17.0]


def test_signs_and_sparse_matrices_add_up() -> None:
    torch.manual_seed(0)
    dense = torch.randn(5, 19) * (torch.rand(5, 19) < 0.3)

    def terms(shift: int) -> LinearTerms:
        rolled = dense.roll(shift)
        rows, columns = rolled.nonzero(as_tuple=True)
        starts = functional.pad(torch.bincount(rows, minlength=5).cumsum(0), (1, 0))
        matrix = SparseMatrix(starts, columns.to(torch.int32), rolled[rows, columns])
        bits = torch.randint(0, 256, (5, 3), dtype=torch.uint8) & torch.tensor([255, 255, 7], dtype=torch.uint8)
        plane = SignPlane(bits, torch.randn(5), torch.randn(19) if shift else None)
        if shift == 2:
            return LinearTerms(signs=(plane,), dense=torch.randn(5, 19))
        return LinearTerms(signs=(plane,), sparse=matrix)

    parts = [(VariantTerms(f"sha256:{shift}", {"m": terms(shift)}), 0.5 - shift) for shift in range(3)]
    zero = torch.zeros(5, 19)
    for chosen in (parts[:2], parts):
        expected = sum(weight * merge_linear(zero, None, each.linears["m"])[0] for each, weight in chosen)
        torch.testing.assert_close(merge_linear(zero, None, compose(chosen).linears["m"])[0], expected)


def test_the_digest_says_what_is_composed(adapters: dict[str, VariantTerms]) -> None:
    a, b = adapters["a"], adapters["b"]
    digest = compose([(a, 0.5), (b, 2)]).digest
    assert digest == compose([(b, 2.0), (a, 0.5)]).digest
    others = [compose(parts).digest for parts in ([(a, 2), (b, 0.5)], [(a, 0.5)], [(a, 0.5), (b, 2), (b, 0)])]
    assert len({digest, a.digest, b.digest, *others}) == 6
    assert compose([(a, 1.0)]) is a


def test_the_order_of_parts_does_not_matter(adapters: dict[str, VariantTerms]) -> None:
    parts = [(adapters[name], weight) for name, weight in (("a", 0.3), ("b", 0.7), ("c", 1.0))]
    one, other = compose(parts), compose(parts[::-1])
    assert all(map(torch.equal, one.tensors(), other.tensors()))


@pytest.mark.parametrize("name", ["dora", "whole"])
def test_what_scales_or_replaces_is_used_alone(name: str, adapters: dict[str, VariantTerms]) -> None:
    assert compose([(adapters[name], 1)]) is adapters[name]
    for parts in ([(adapters[name], 0.5)], [(adapters[name], 1), (adapters["a"], 1)]):
        with pytest.raises(InvalidRequestError, match="use it alone"):
            compose(parts)


def test_weights_are_numbers(adapters: dict[str, VariantTerms]) -> None:
    for weight in (float("nan"), float("inf")):
        with pytest.raises(InvalidRequestError, match="finite"):
            compose([(adapters["a"], weight)])
    with pytest.raises(InvalidRequestError, match="at least one"):
        compose([])

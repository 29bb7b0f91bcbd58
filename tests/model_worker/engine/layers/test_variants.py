"""Modules whose rows use variants equal modules into whose weights the variants are merged."""

from __future__ import annotations

import importlib
from dataclasses import replace
from functools import partial
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from delta.extra_tokens import given_rows
from delta.merge_terms import merge_embedding, merge_linear
from delta.variant_terms import EmbeddingTerms, LinearTerms
from model_worker.engine.layers import variants
from model_worker.engine.layers.linear import DenseMethod, Linear, choose_method
from model_worker.engine.layers.row_axes import RowAxes
from model_worker.engine.layers.variants import (
    BoundLinear,
    VariantEmbedding,
    VariantMethod,
    VariantModule,
    factors_of,
    substituted,
    with_parameters,
)
from model_worker.engine.ops.low_rank import LowRankFactors, SegmentPlan, table_rows
from model_worker.engine.ops.sign_matmul import SignMatrix
from tests.fakes.random_terms import random_plane, random_sparse

CPU = torch.device("cpu")
BOUNDS = [(1, 3), (3, 4), (4, 4), (6, 10)]
NUM_ROWS = 12


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def _linear(*, bias: bool) -> Linear:
    layer = Linear(20, 24, bias=bias, dtype=torch.float32, device=CPU)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer


def _terms(kind: str) -> LinearTerms:
    a, b = torch.randn(5, 20), torch.randn(24, 5)
    return {
        "low rank": LinearTerms(a=a, b=b),
        "bias": LinearTerms(bias=torch.randn(24)),
        "outputs": LinearTerms(a=a, b=b, output_scale=torch.rand(24)),
        "inputs": LinearTerms(input_scale=torch.rand(20)),
        "whole": LinearTerms(output_scale=torch.zeros(24), dense=torch.randn(24, 20), bias=torch.randn(24)),
        "all": LinearTerms(a, b, torch.rand(24), torch.rand(20), torch.randn(24, 20), torch.randn(24)),
        "signs": LinearTerms(signs=(random_plane(24, 20), random_plane(24, 20))),
        "sparse and signs": LinearTerms(a, b, signs=(random_plane(24, 20),), sparse=random_sparse(24, 20)),
    }[kind]


def _bound(terms: LinearTerms | None) -> BoundLinear | None:
    if terms is None:
        return None
    signs = tuple(SignMatrix(plane, 20, dtype=torch.float32, device=CPU) for plane in terms.signs)
    return BoundLinear(replace(terms, signs=()), signs)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "kinds",
    [
        ("low rank", "bias", "outputs", "inputs"),
        ("whole", None, "all", "all"),
        (None, None, None, "low rank"),
        ("signs", "sparse and signs", "low rank", "sparse and signs"),
    ],
)
def test_each_row_of_a_linear_has_the_merged_weights(kinds: tuple[str | None, ...], bias: bool) -> None:
    layer = _linear(bias=bias)
    assert layer.weight is not None
    weight = layer.weight.detach().clone()
    layer.method = choose_method(layer, shared_weight=False)
    terms = [None if kind is None else _terms(kind) for kind in kinds]
    plan = SegmentPlan.of(BOUNDS, num_rows=NUM_ROWS, max_rank=5, device=CPU)
    x = torch.randn(1, NUM_ROWS, 20)
    base = layer(x)
    method = VariantMethod(layer.method, [_bound(part) for part in terms], plan, None)
    with substituted({layer: method}, {}):
        y = layer(x)
    assert torch.equal(method.weight(layer), weight)
    assert torch.equal(layer(x), base)
    expected = base.clone()
    for (start, end), part in zip(BOUNDS, terms, strict=True):
        if part is not None:
            merged, merged_bias = merge_linear(weight, layer.bias, part)
            expected[:, start:end] = F.linear(x[:, start:end], merged, merged_bias)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


def test_the_kernels_for_gpus_get_what_they_need(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    pytest.importorskip("triton")
    kernels = importlib.import_module("model_worker.engine.ops.low_rank.triton")
    layer, kinds = _linear(bias=True), ("low rank", None, None, "outputs")
    terms = [None if kind is None else _bound(_terms(kind)) for kind in kinds]
    x = torch.randn(NUM_ROWS, 20)
    plan = SegmentPlan.of(BOUNDS, num_rows=NUM_ROWS, max_rank=5, device=CPU)
    expected = VariantMethod(DenseMethod(), terms, plan, None).apply(layer, x, layer.bias)
    monkeypatch.setattr(variants, "add_low_rank", partial(_add_low_rank, kernels))
    table = table_rows([factors_of(part) for part in terms])[None]
    found = VariantMethod(DenseMethod(), terms, plan.tiled(CPU), table).apply(layer, x, layer.bias)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def _add_low_rank(kernels: ModuleType, x: Tensor, out: Tensor, factors: LowRankFactors, plan: SegmentPlan) -> None:
    kernels.expand(kernels.shrink(x, factors, plan), out, factors, plan)


def test_all_rows_have_to_be_there() -> None:
    layer = _linear(bias=False)
    plan = SegmentPlan.of([(0, 1)], num_rows=3, max_rank=5, device=CPU)
    with pytest.raises(AssertionError):
        VariantMethod(layer.method, [_bound(_terms("low rank"))], plan, None).apply(layer, torch.randn(2, 20), None)


def _bound_embedding(terms: EmbeddingTerms) -> EmbeddingTerms:
    """As a model binds those of 30 rows."""
    return EmbeddingTerms(*given_rows(terms, 30), None if terms.a is None else terms.a.T, terms.b)


class _ScaledEmbedding(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 3.0


@pytest.mark.parametrize("kind", [nn.Embedding, _ScaledEmbedding])
def test_each_row_of_an_embedding_has_the_merged_table(kind: type[nn.Embedding]) -> None:
    embedding = kind(30, 6, padding_idx=20)
    replaced = EmbeddingTerms(token_ids=torch.tensor([2, 29]), rows=torch.randn(2, 6))
    both = EmbeddingTerms(replaced.token_ids, torch.randn(2, 6), torch.randn(3, 30), torch.randn(6, 3))
    more = replace(both, extra_rows=torch.randn(3, 6))  # tokens that the base does not have
    all_terms = (replaced, both, more)
    token_ids = torch.tensor([[2, 29, 5, 2, 28, 20, 2, 0, 29, 30, 32, 5]])
    rows_of = (slice(1, 3), slice(3, 8), slice(8, 11))
    segments = [(rows, _bound_embedding(terms)) for rows, terms in zip(rows_of, all_terms, strict=True)]
    expected = embedding(token_ids.clamp(max=29))
    for rows, terms in zip(rows_of, all_terms, strict=True):
        table = merge_embedding(embedding.weight, terms)
        merged = kind(len(table), 6, _weight=table)
        expected[:, rows] = merged(token_ids[:, rows])
    with torch.no_grad(), substituted({}, {embedding: VariantEmbedding(embedding, segments)}):
        torch.testing.assert_close(embedding(token_ids), expected)


@pytest.mark.parametrize("axis", [1, 2])
def test_other_modules_are_computed_by_copies(axis: int) -> None:
    norm = nn.LayerNorm(4)
    copy = with_parameters(norm, {"weight": torch.randn(4), "bias": torch.randn(4)})
    x = torch.randn(1, 5, 5, 4)
    expected = norm(x)
    rows = (slice(None),) * axis + (slice(2, 4),)
    expected[rows] = copy(x[rows])
    with torch.no_grad():
        axes = RowAxes(axis, (axis,), rows_lead=False, dtype=torch.float32)
        with substituted({}, {norm: VariantModule(norm, axes, [(slice(2, 4), copy)])}):
            torch.testing.assert_close(norm(x), expected)
    assert not torch.equal(copy.weight, norm.weight)
    assert torch.equal(norm.weight, torch.ones(4))

"""Terms of variants, divided: every rank's share of the base, merged with its share of the terms, is its share of both
merged.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from delta.merge_terms import merge_embedding, merge_linear
from delta.variant_terms import EmbeddingTerms, LinearTerms, VariantTerms
from model_worker.engine.parallel.sharding import Division, Part, Share, cut, inputs, outputs
from model_worker.engine.parallel.variant_sharding import divide_variant
from tests.fakes.random_terms import random_plane, random_sparse

N, K = 12, 40
RANKS = 2
QKV = outputs(Part(8, 4, "heads"), Part(2, 2, "KV heads", repeats=True), Part(2, 2, "KV heads", repeats=True))
COLUMNS = inputs(Part(20, 4, "heads"), Part(20, 4, "heads"))  # no stretch of which is whole bytes of bits


def _terms() -> dict[str, LinearTerms]:
    torch.manual_seed(0)
    return {
        "lora": LinearTerms(a=torch.randn(3, K), b=torch.randn(N, 3), bias=torch.randn(N)),
        "scales": LinearTerms(output_scale=torch.rand(N), input_scale=torch.rand(K), dense=torch.randn(N, K)),
        "signs": LinearTerms(signs=(random_plane(N, K), random_plane(N, K, has_columns=False))),
        "sparse": LinearTerms(sparse=random_sparse(N, K)),
    }


def _divided(terms: LinearTerms, division: Division, rank: int) -> LinearTerms:
    return divide_variant(VariantTerms("", {"m": terms}), {"m": division}, Share(rank, RANKS)).linears["m"]


@pytest.mark.parametrize("name", _terms())
@pytest.mark.parametrize("rank", range(RANKS))
def test_terms_divided_by_outputs(name: str, rank: int) -> None:
    terms, weight, share = _terms()[name], torch.randn(N, K), Share(rank, RANKS)
    whole, whole_bias = merge_linear(weight, None, terms)
    mine, bias = merge_linear(cut(weight, 0, QKV, share), None, _divided(terms, QKV, rank))
    torch.testing.assert_close(mine, cut(whole, 0, QKV, share))
    if whole_bias is not None:
        assert bias is not None
        assert torch.equal(bias, cut(whole_bias, 0, QKV, share))


@pytest.mark.parametrize("name", _terms())
def test_terms_divided_by_inputs(name: str) -> None:
    terms, weight = _terms()[name], torch.randn(N, K)
    whole, whole_bias = merge_linear(weight, None, terms)
    biases: list[Tensor | None] = []
    for rank in range(RANKS):
        share = Share(rank, RANKS)
        mine, bias = merge_linear(cut(weight, 1, COLUMNS, share), None, _divided(terms, COLUMNS, rank))
        torch.testing.assert_close(mine, cut(whole, 1, COLUMNS, share))
        biases.append(bias)
    if whole_bias is not None:  # ranks' outputs are added up: it must be in one of them only
        assert biases[0] is not None
        assert torch.equal(biases[0], whole_bias)
        assert biases[1] is not None
        assert not biases[1].any()


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_an_embedding_is_divided_by_tokens(num_ranks: int) -> None:
    torch.manual_seed(0)
    num_tokens, width = 10, 8
    terms = EmbeddingTerms(
        token_ids=torch.tensor([1, 8]),
        rows=torch.randn(2, width),
        a=torch.randn(2, num_tokens),
        b=torch.randn(width, 2),
        signs=(random_plane(num_tokens, width),),
        extra_rows=torch.randn(3, width),
    )
    table, tokens = torch.randn(num_tokens, width), outputs(Part(num_tokens, num_tokens, "tokens", uneven=True))
    pieces = []
    for rank in range(num_ranks):
        share = Share(rank, num_ranks)
        divided = divide_variant(VariantTerms("", embeddings={"e": terms}), {"e": tokens}, share)
        pieces.append(merge_embedding(cut(table, 0, tokens, share), divided.embeddings["e"]))
    torch.testing.assert_close(torch.cat(pieces), merge_embedding(table, terms))


def test_rows_of_the_head_beyond_the_base_are_for_rank_0() -> None:
    terms = LinearTerms(extra_rows=torch.randn(2, K))
    assert [_divided(terms, QKV, rank).extra_rows is None for rank in range(RANKS)] == [False, True]


def test_experts_are_divided_and_what_has_no_division_is_whole() -> None:
    terms = VariantTerms(
        "",
        experts={"x.experts.down_proj": {1: _terms()["lora"]}},
        vectors={"norm": torch.ones(4), "sinks": torch.arange(4)},
    )
    divisions = {"x.experts.down_proj": COLUMNS, "sinks": outputs(Part(4, 4, "heads"))}
    divided = divide_variant(terms, divisions, Share(1, RANKS))
    a = divided.experts["x.experts.down_proj"][1].a
    assert a is not None
    assert a.shape == (3, K // 2)
    assert torch.equal(divided.vectors["norm"], torch.ones(4))
    assert divided.vectors["sinks"].tolist() == [2, 3]

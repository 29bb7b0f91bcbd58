"""Embeddings of variants, by the kernel for GPUs in the interpreter, are rows of the merged tables."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import ModuleType

import pytest
import torch

from delta.merge_terms import merge_embedding
from delta.variant_terms import EmbeddingTerms
from model_worker.engine.ops.embedding_terms.functional import TABLE_COLUMNS, table_row
from tests.fakes.random_terms import random_plane
from tests.model_worker.engine.ops.compile_for_gpu import assert_they_compile

VOCAB_SIZE = 50
_RTOL = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@pytest.fixture(scope="module")
def kernels(interpreted: Callable[[str], ModuleType]) -> ModuleType:
    return interpreted("embedding_terms")


@pytest.mark.parametrize("dtype", _RTOL)
@pytest.mark.parametrize("size", [5, 600])
def test_rows_of_merged_tables(kernels: ModuleType, size: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight = torch.randn(VOCAB_SIZE, size).to(dtype)
    given = EmbeddingTerms(token_ids=torch.tensor([0, 7, 49]), rows=torch.randn(3, size).to(dtype))
    factors = EmbeddingTerms(a=torch.randn(3, VOCAB_SIZE).to(dtype), b=torch.randn(size, 3).to(dtype))
    planes = EmbeddingTerms(signs=tuple(random_plane(VOCAB_SIZE, size) for _ in range(2)))
    everything = EmbeddingTerms(given.token_ids, given.rows, factors.a, factors.b, planes.signs)
    variants = [given, factors, planes, everything]
    bound = [replace(each, a=None if each.a is None else each.a.T.contiguous()) for each in variants]
    table = torch.stack([torch.zeros(TABLE_COLUMNS, dtype=torch.int64), *map(table_row, bound)])
    tokens = torch.tensor([0, 7, 8, 49, 3] * 5)
    numbers = torch.arange(25) // 5 + 1  # the first five are of a variant that changes nothing
    numbers[4] = 0
    x = weight[tokens]
    kernels.embed_rows(tokens, x, table, numbers, VOCAB_SIZE)
    merged = [weight, *(merge_embedding(weight.float(), each).to(dtype) for each in variants)]
    expected = torch.cat([merged[variant][tokens[5 * variant : 5 * variant + 5]] for variant in range(5)])
    torch.testing.assert_close(x, expected, rtol=_RTOL[dtype], atol=3 * _RTOL[dtype])


def test_tokens_beyond_the_vocabulary_are_given(kernels: ModuleType) -> None:
    rows = torch.randn(2, 8)
    terms = EmbeddingTerms(torch.tensor([50, 51]), rows, torch.randn(VOCAB_SIZE, 2), torch.randn(8, 2))
    x = torch.randn(2, 8)
    kernels.embed_rows(torch.tensor([51, 50]), x, table_row(terms)[None], torch.ones(2, dtype=torch.int64), VOCAB_SIZE)
    assert torch.equal(x, rows.flip(0))


def test_it_compiles_for_gpus() -> None:
    types = {"tokens": "*i64", "x": "*bf16", "table": "*i64", "numbers": "*i64"}
    constants = {
        "MAX_PLANES": 4, "HEADER_COLUMNS": 6, "PLANE_COLUMNS": 3, "TABLE_COLUMNS": TABLE_COLUMNS, "BLOCK": 512
    }  # fmt: skip
    module = "model_worker.engine.ops.embedding_terms.triton_kernels"
    assert_they_compile((module, "embed_rows_kernel", types, constants))

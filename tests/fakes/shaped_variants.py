"""Random variants with terms of all kinds, for the modules of any family of transformers."""

from __future__ import annotations

import random

import torch

from delta.peft.base_model import ModelShapes
from delta.variant_terms import EmbeddingTerms, LinearTerms, VariantTerms
from tests.fakes.random_terms import random_plane, random_sparse

_WITHOUT_EXPERTS = ("llama4_text",)  # whose experts cannot have terms


def _linear_terms(shape: tuple[int, int], kind: str, *, has_bias: bool) -> LinearTerms:
    num_outputs, num_inputs = shape
    rank = random.choice((1, 2, 3, 8, 17))
    a, b = torch.randn(rank, num_inputs) * 0.1, torch.randn(num_outputs, rank) * 0.1
    bias = torch.randn(num_outputs) * 0.1 if has_bias else None
    if kind == "low rank":
        return LinearTerms(a=a, b=b)
    if kind == "scaled":
        return LinearTerms(a=a, b=b, output_scale=torch.rand(num_outputs) + 0.5, bias=bias)
    if kind == "signs":
        planes = [random_plane(num_outputs, num_inputs, scale=0.1, has_columns=has) for has in (True, False)]
        return LinearTerms(a=a, b=b, signs=tuple(planes[: random.choice((1, 2))]), bias=bias)
    if kind == "sparse":
        return LinearTerms(sparse=random_sparse(num_outputs, num_inputs, scale=0.3), bias=bias)
    if kind == "dense":
        dense = torch.randn(num_outputs, num_inputs) * 0.2
        return LinearTerms(output_scale=torch.zeros(num_outputs), dense=dense, bias=bias)
    assert kind == "input"
    return LinearTerms(input_scale=torch.rand(num_inputs) + 0.5)


def shaped_variant(shapes: ModelShapes, *, seed: int, model_type: str, low_rank: bool = False) -> VariantTerms:
    """Random terms of all kinds; with `low_rank`, low-rank terms for all linears and nothing else."""
    random.seed(seed)
    torch.manual_seed(seed)
    kinds = ["low rank"] if low_rank else ["low rank", "scaled", "dense", "input", "signs", "sparse"]
    linears = {
        name: _linear_terms((linear.out_features, linear.in_features), random.choice(kinds), has_bias=linear.has_bias)
        for name, linear in shapes.linears.items()
        if low_rank or random.random() < 0.8
    }
    if low_rank:
        return VariantTerms(f"sha256:{seed}", linears)
    experts = {}
    if model_type not in _WITHOUT_EXPERTS:
        for name, shape in shapes.experts.items():
            matrix = (shape.out_features, shape.in_features)
            chosen = [expert for expert in range(shape.num_experts) if random.random() < 0.7]
            experts[name] = {i: _linear_terms(matrix, random.choice(kinds), has_bias=False) for i in chosen}
    rows, width = shapes.embeddings[shapes.input_embedding]
    embedding = EmbeddingTerms(
        token_ids=torch.tensor([3, 40, 77]),
        rows=torch.randn(3, width) * 0.02,
        a=torch.randn(4, rows) * 0.1,
        b=torch.randn(width, 4) * 0.02,
        signs=(random_plane(rows, width, scale=0.02),),
    )
    vectors = {
        name: torch.randn(shape) * 0.3 + 1.0 for name, shape in shapes.vectors.items() if not name.endswith("sinks")
    }
    return VariantTerms(f"sha256:{seed}", linears, experts, {shapes.input_embedding: embedding}, vectors)

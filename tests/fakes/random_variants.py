"""Random variants with terms of all kinds, and the checkpoints that they stand for."""

from __future__ import annotations

import random

import torch
from torch import Tensor

from delta.merge_terms import merge_embedding, merge_experts, merge_linear
from delta.variant_terms import EmbeddingTerms, LinearTerms, VariantTerms
from tests.fakes.random_terms import random_plane, random_sparse, random_ternary

EMBEDDING = "model.embed_tokens"
HEAD = "lm_head"

Weights = dict[str, Tensor]


def linear_terms(weight: Tensor, kind: str) -> LinearTerms:
    num_outputs, num_inputs = weight.shape
    rank = random.choice((1, 2, 3, 8, 17))
    a, b = torch.randn(rank, num_inputs) * 0.2, torch.randn(num_outputs, rank) * 0.2
    if kind == "low rank":
        return LinearTerms(a=a, b=b)
    if kind == "scaled":
        return LinearTerms(a=a, b=b, output_scale=torch.rand(num_outputs) + 0.5)
    if kind == "dense":
        return LinearTerms(output_scale=torch.zeros(num_outputs), dense=torch.randn(num_outputs, num_inputs) * 0.3)
    if kind == "signs":
        return LinearTerms(signs=(random_plane(num_outputs, num_inputs, scale=0.1),))
    if kind == "ternary and more":
        planes = (
            *random_ternary(num_outputs, num_inputs, scale=0.1),
            random_plane(num_outputs, num_inputs, scale=0.02),
        )
        return LinearTerms(a=a, b=b, signs=planes)
    if kind == "sparse":
        return LinearTerms(sparse=random_sparse(num_outputs, num_inputs, scale=0.3))
    assert kind == "input"
    return LinearTerms(input_scale=torch.rand(num_inputs) + 0.5)


def random_variant(weights: Weights, *, seed: int, share: float = 0.8) -> VariantTerms:
    """Random terms of all kinds, for about a share of the modules."""
    random.seed(seed)
    torch.manual_seed(seed)
    linears, experts, vectors = {}, {}, {}
    for name, weight in weights.items():
        module = name.removesuffix(".weight")
        if random.random() > share or module == EMBEDDING or name.endswith(".bias"):
            continue
        if weight.ndim == 3:
            chosen = [expert for expert in range(len(weight)) if random.random() < 0.7]
            kinds = ("low rank", "signs", "sparse")
            experts[name] = {expert: linear_terms(weight[expert], random.choice(kinds)) for expert in chosen}
        elif weight.ndim == 2:
            kinds = ["low rank", "low rank", "scaled", "dense", "signs", "ternary and more", "sparse"]
            if module.endswith(("o_proj", "down_proj")):
                kinds.append("input")
            linears[module] = linear_terms(weight, random.choice(kinds))
        else:
            vectors[name] = torch.randn_like(weight) * 0.3 + 1.0
    vocab_size, hidden_size = weights[f"{EMBEDDING}.weight"].shape
    embedding = EmbeddingTerms(
        token_ids=torch.tensor([3, 40, 77]),
        rows=torch.randn(3, hidden_size) * 0.02,
        a=torch.randn(4, vocab_size) * 0.1,
        b=torch.randn(hidden_size, 4) * 0.1,
        signs=(random_plane(vocab_size, hidden_size, scale=0.02),),
    )
    return VariantTerms(f"sha256:{seed}", linears, experts, {EMBEDDING: embedding}, vectors)


def merged_weights(weights: Weights, terms: VariantTerms) -> Weights:
    """A checkpoint whose head is a matrix of its own."""
    merged = dict(weights)
    merged.setdefault(f"{HEAD}.weight", weights[f"{EMBEDDING}.weight"])
    for module, linear in terms.linears.items():
        merged[f"{module}.weight"], _ = merge_linear(merged[f"{module}.weight"], None, linear)
    for name, of_expert in terms.experts.items():
        merged[name] = merge_experts(weights[name], of_expert)
    for embedding in terms.embeddings.values():
        merged[f"{EMBEDDING}.weight"] = merge_embedding(weights[f"{EMBEDDING}.weight"], embedding)
    return merged | dict(terms.vectors)

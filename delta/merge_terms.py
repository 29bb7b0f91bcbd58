"""The weights that a variant stands for: its terms merged into those of the base.

Readable and slow; for tests, and for tools that write a merged model. Shapes as in `delta.variant_terms`.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from delta.variant_terms import EmbeddingTerms, LinearTerms


def merge_linear(weight: Tensor, bias: Tensor | None, terms: LinearTerms) -> tuple[Tensor, Tensor | None]:
    """W' = e ∘ W ∘ d + B A + Z and b' = b + c; a missing bias counts as 0. weight [N, K], bias [N], both float32."""
    merged = weight.clone()
    if terms.output_scale is not None:
        merged *= terms.output_scale.float()[:, None]
    if terms.input_scale is not None:
        merged *= terms.input_scale.float()
    if terms.a is not None and terms.b is not None:
        merged += terms.b.float() @ terms.a.float()
    if terms.dense is not None:
        merged += terms.dense.float()
    if terms.bias is None:
        return merged, bias
    return merged, terms.bias.float() if bias is None else bias + terms.bias.float()


def merge_embedding(table: Tensor, terms: EmbeddingTerms) -> Tensor:
    """The rows of `terms` in place of the table's, plus (B A)ᵀ. table [V, H] float32"""
    merged = table.clone()
    if terms.token_ids is not None and terms.rows is not None:
        merged[terms.token_ids] = terms.rows.float()
    if terms.a is not None and terms.b is not None:
        merged += (terms.b.float() @ terms.a.float()).T
    return merged


def merge_experts(weights: Tensor, terms: Mapping[int, LinearTerms]) -> Tensor:
    """Every expert merged as a linear layer. weights [E, N, K] float32"""
    merged = weights.clone()
    for index, of_expert in terms.items():
        merged[index], _ = merge_linear(weights[index], None, of_expert)
    return merged

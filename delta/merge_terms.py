"""The weights that a variant stands for: its terms merged into those of the base.

Readable and slow; for tests, and for tools that write a merged model. Shapes as in `delta.variant_terms`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from delta.variant_terms import EmbeddingTerms, LinearTerms, SignPlane, SparseMatrix


def merge_linear(weight: Tensor, bias: Tensor | None, terms: LinearTerms) -> tuple[Tensor, Tensor | None]:
    """W' = e ∘ W ∘ d + Σ u ∘ (S ∘ v) + B A + Z and b' = b + c; a missing bias counts as 0. [N, K] and [N] float32

    Then the rows that the base does not have: [N + E, K] and [N + E].
    """
    merged = weight.clone()
    if terms.output_scale is not None:
        merged *= terms.output_scale.float()[:, None]
    if terms.input_scale is not None:
        merged *= terms.input_scale.float()
    if terms.a is not None and terms.b is not None:
        merged += terms.b.float() @ terms.a.float()
    if terms.dense is not None:
        merged += terms.dense.float()
    if terms.sparse is not None:
        merged += sparse_to_dense(terms.sparse, weight.shape[1])
    for plane in terms.signs:
        merged += signs_to_dense(plane, weight.shape[1])
    if terms.bias is not None:
        bias = terms.bias.float() if bias is None else bias + terms.bias.float()
    if terms.extra_rows is not None:
        merged = torch.cat([merged, terms.extra_rows.float()])
    if terms.extra_bias is not None:
        assert bias is not None
        bias = torch.cat([bias, terms.extra_bias.float()])
    return merged, bias


def merge_embedding(table: Tensor, terms: EmbeddingTerms) -> Tensor:
    """The table plus (B A)ᵀ plus planes, with the rows of `terms` in place of some, and after it. [V, H] float32"""
    merged = table.clone()
    for plane in terms.signs:
        merged += signs_to_dense(plane, table.shape[1])
    if terms.token_ids is not None and terms.rows is not None:
        merged[terms.token_ids] = terms.rows.float()
    if terms.a is not None and terms.b is not None:
        merged += (terms.b.float() @ terms.a.float()).T
    return merged if terms.extra_rows is None else torch.cat([merged, terms.extra_rows.float()])


def merge_experts(weights: Tensor, terms: Mapping[int, LinearTerms]) -> Tensor:
    """Every expert merged as a linear layer. weights [E, N, K] float32"""
    merged = weights.clone()
    for index, of_expert in terms.items():
        merged[index], _ = merge_linear(weights[index], None, of_expert)
    return merged


def signs_to_dense(plane: SignPlane, num_columns: int) -> Tensor:
    """u ∘ (S ∘ v). -> [N, num_columns] float32"""
    signs = unpack_signs(plane.bits, num_columns).float() * 2 - 1
    if plane.column_scale is not None:
        signs *= plane.column_scale.float()
    return signs * plane.row_scale.float()[:, None]


def unpack_signs(bits: Tensor, num_columns: int) -> Tensor:
    """Where S is +1. bits as in `SignPlane` -> [N, num_columns] bool"""
    places = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return (bits[:, :, None] >> places & 1).flatten(1)[:, :num_columns].bool()


def sparse_to_dense(matrix: SparseMatrix, num_columns: int) -> Tensor:
    """-> [N, num_columns] float32"""
    dense = torch.zeros(len(matrix.row_starts) - 1, num_columns, device=matrix.values.device)
    dense[rows_of(matrix), matrix.columns.long()] = matrix.values.float()
    return dense


def rows_of(matrix: SparseMatrix) -> Tensor:
    """The row of each value. -> [nnz] int64"""
    counts = matrix.row_starts.diff()
    rows = torch.arange(len(counts), device=counts.device)
    return torch.repeat_interleave(rows, counts, output_size=len(matrix.columns))  # else a GPU would be asked for it

"""Rows of a step's embeddings that variants change.

    x[t] = given row of the variant for tokens[t], if there is one;  else x[t] + Σ u[token] (v ∘ S[token])
    x[t] = x[t] + B A[token]                                                          for tokens of the base

    embed_rows(tokens, x, terms)        in place

        tokens   [T] int64; those beyond the base's vocabulary have given rows
        x        [T, H] of the embedding's dtype, contiguous: the base's rows; of tokens that it does not have, anything
        A        [V, r], B [H, r] and given rows [n, H] of x's dtype; their tokens [n] int64, ascending
        S        [V, H] of -1 and +1, bits as in `SignPlane`; u [V], v [H] float32

Sums are float32, rounded once. Where terms are is read from a table, by the number of each row's variant, so that a
captured graph serves any rows. On CPUs variants have their rows computed one after the other, by `layers/row_terms.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from delta.variant_terms import EmbeddingTerms

MAX_PLANES = 4
_HEADER_COLUMNS = 6
_PLANE_COLUMNS = 3
TABLE_COLUMNS = _HEADER_COLUMNS + MAX_PLANES * _PLANE_COLUMNS
"""Addresses of given rows' tokens, of these rows, of A, of B; how many are given; r; of each plane, bits, u and v."""


@dataclass(frozen=True, slots=True, eq=False)
class EmbeddingTable:
    """Terms of all variants, and whose rows are whose.

    Attributes:
        rows: [variants, TABLE_COLUMNS] int64 on the device, of `table_row`.
        numbers: [T] integers, 1 + number of the variant of each row; 0: the base.
        num_tokens: V.
    """

    rows: Tensor
    numbers: Tensor
    num_tokens: int


def table_row(terms: EmbeddingTerms) -> Tensor:
    """What the kernel has to know of one variant. -> [TABLE_COLUMNS] int64

    The addresses hold as long as the terms live.

    Args:
        terms: on the device, `a` as [V, r], every plane with its column scale, at most `MAX_PLANES` of them.
    """
    row = torch.zeros(TABLE_COLUMNS, dtype=torch.int64)
    if terms.token_ids is not None and terms.rows is not None:
        row[0], row[1], row[4] = terms.token_ids.data_ptr(), terms.rows.data_ptr(), len(terms.token_ids)
    if terms.a is not None and terms.b is not None:
        row[2], row[3], row[5] = terms.a.data_ptr(), terms.b.data_ptr(), terms.a.shape[1]
    for index, plane in enumerate(terms.signs):
        assert plane.column_scale is not None
        first = _HEADER_COLUMNS + index * _PLANE_COLUMNS
        addresses = [plane.bits.data_ptr(), plane.row_scale.data_ptr(), plane.column_scale.data_ptr()]
        row[first : first + _PLANE_COLUMNS] = torch.tensor(addresses)
    return row


def embed_rows(tokens: Tensor, x: Tensor, table: EmbeddingTable) -> None:
    """See the module's docstring."""
    from model_worker.engine.ops.embedding_terms import triton  # not installed where there is no GPU

    triton.embed_rows(tokens, x, table.rows, table.numbers, table.num_tokens)

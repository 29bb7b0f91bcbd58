"""Several adapters with weights as one variant (ADR 0008): exact, since only what adds up is composed."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from delta.merge_terms import rows_of, sparse_to_dense
from delta.peft.terms_builder import scaled
from delta.variant_terms import EmbeddingTerms, LinearTerms, SignPlane, SparseMatrix, VariantTerms
from registry.errors import InvalidRequestError

K = TypeVar("K")
T = TypeVar("T")
Weighted = list[tuple[T, float]]


def compose(parts: Sequence[tuple[VariantTerms, float]]) -> VariantTerms:
    """The variant Σ w · v: ranks side by side, weights folded into B, Z and c. The order of the parts does not matter.

    Raises:
        InvalidRequestError: no parts, a weight that is not finite, or an adapter that scales or replaces weights of
            the base (DoRA, IA3, modules or rows held whole), of which there is no sum.
    """
    if len(parts) == 1 and parts[0][1] == 1:
        return parts[0][0]
    _check(parts)
    ordered = sorted(parts, key=lambda part: (part[0].digest, part[1]))
    return VariantTerms(
        digest=_digest(ordered),
        linears=_by_key([(terms.linears, weight) for terms, weight in ordered], _add_linears),
        experts=_by_key(
            [(terms.experts, weight) for terms, weight in ordered], lambda maps: _by_key(maps, _add_linears)
        ),
        embeddings=_by_key([(terms.embeddings, weight) for terms, weight in ordered], _add_embeddings),
    )


def _check(parts: Sequence[tuple[VariantTerms, float]]) -> None:
    if not parts:
        raise InvalidRequestError("name at least one adapter", param="loras")
    for terms, weight in parts:
        if not math.isfinite(weight):
            raise InvalidRequestError(f"the scale {weight} of an adapter is not a finite number", param="loras")
        if not terms.adds_only:
            raise InvalidRequestError(
                f"the adapter {terms.digest} scales or replaces weights of the base (DoRA, IA3, modules_to_save or "
                "trained tokens) and cannot be added to others or scaled; use it alone with a scale of 1",
                param="loras",
            )


def _digest(parts: Sequence[tuple[VariantTerms, float]]) -> str:
    hasher = hashlib.sha256()
    for terms, weight in parts:
        hasher.update(f"{terms.digest} {float(weight).hex()}\n".encode())
    return f"sha256:{hasher.hexdigest()}"


def _by_key(maps: Sequence[tuple[Mapping[K, T], float]], add: Callable[[Weighted[T]], T]) -> dict[K, T]:
    keys = dict.fromkeys(key for found, _ in maps for key in found)
    return {key: add([(found[key], weight) for found, weight in maps if key in found]) for key in keys}


def _add_linears(parts: Weighted[LinearTerms]) -> LinearTerms:
    dense = _sum([(terms.dense, weight) for terms, weight in parts])
    sparse = _add_sparse([(terms.sparse, weight) for terms, weight in parts if terms.sparse is not None])
    if dense is not None and sparse is not None:
        dense, sparse = dense + sparse_to_dense(sparse, dense.shape[1]), None
    return LinearTerms(
        **_add_low_rank([(terms.a, terms.b, weight) for terms, weight in parts]),
        dense=dense,
        bias=_sum([(terms.bias, weight) for terms, weight in parts]),
        signs=_add_signs([(terms.signs, weight) for terms, weight in parts]),
        sparse=sparse,
    )


def _add_embeddings(parts: Weighted[EmbeddingTerms]) -> EmbeddingTerms:
    return EmbeddingTerms(
        **_add_low_rank([(terms.a, terms.b, weight) for terms, weight in parts]),
        signs=_add_signs([(terms.signs, weight) for terms, weight in parts]),
    )


def _add_signs(parts: Weighted[tuple[SignPlane, ...]]) -> tuple[SignPlane, ...]:
    return tuple(replace(plane, row_scale=plane.row_scale * weight) for planes, weight in parts for plane in planes)


def _add_low_rank(parts: Sequence[tuple[Tensor | None, Tensor | None, float]]) -> dict[str, Tensor]:
    factors = [(a, scaled(b, weight)) for a, b, weight in parts if a is not None and b is not None]
    if not factors:
        return {}
    return {"a": torch.cat([a for a, _ in factors]), "b": torch.cat([b for _, b in factors], dim=1)}


def _add_sparse(parts: Weighted[SparseMatrix]) -> SparseMatrix | None:
    if not parts:
        return None
    places = [torch.stack([rows_of(matrix), matrix.columns.long()]) for matrix, _ in parts]
    values = torch.cat([matrix.values.float() * weight for matrix, weight in parts])
    summed = torch.sparse_coo_tensor(torch.cat(places, dim=1), values, check_invariants=False).coalesce()
    rows, columns = summed.indices()
    counts = torch.bincount(rows, minlength=len(parts[0][0].row_starts) - 1)
    return SparseMatrix(functional.pad(counts.cumsum(0), (1, 0)), columns.to(torch.int32), summed.values())


def _sum(parts: Sequence[tuple[Tensor | None, float]]) -> Tensor | None:
    found = [tensor.float() * weight for tensor, weight in parts if tensor is not None]
    return torch.stack(found).sum(dim=0) if found else None

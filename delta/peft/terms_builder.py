"""Collects the terms of a variant while the parts of its files are read one after the other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from delta.variant_terms import EmbeddingTerms, LinearTerms, VariantTerms
from registry.errors import CheckpointError


class TermsBuilder:
    """Each term of a module may be given once; only biases add up.

    Raises:
        CheckpointError: from all methods that add: `source` changes a module in two ways of which there is no sum.
    """

    def __init__(self, source: Path) -> None:
        self._source = source
        self._linears: dict[str, dict[str, Any]] = {}  # terms of LinearTerms, by name
        self._experts: dict[str, dict[int, LinearTerms]] = {}
        self._embeddings: dict[str, EmbeddingTerms] = {}
        self._vectors: dict[str, Tensor] = {}

    def add_linear(self, module: str, **terms: Tensor) -> None:
        """`terms` are those of LinearTerms."""
        known = self._linears.setdefault(module, {})
        for name, tensor in terms.items():
            if name != "bias":
                self._check_new(module, name in known)
            known[name] = known[name].float() + tensor.float() if name in known else tensor

    def add_expert(self, parameter: str, index: int, terms: LinearTerms) -> None:
        of_parameter = self._experts.setdefault(parameter, {})
        self._check_new(parameter, index in of_parameter)
        of_parameter[index] = terms

    def add_embedding(self, module: str, terms: EmbeddingTerms) -> None:
        self._check_new(module, module in self._embeddings)
        self._embeddings[module] = terms

    def add_table(self, module: str, table: Tensor) -> None:
        """All rows of an embedding are replaced. table [V, H]"""
        self.add_embedding(module, EmbeddingTerms(token_ids=torch.arange(len(table)), rows=table))

    def add_vector(self, parameter: str, vector: Tensor) -> None:
        self._check_new(parameter, parameter in self._vectors)
        self._vectors[parameter] = vector

    def build(self, digest: str) -> VariantTerms:
        linears = {module: LinearTerms(**terms) for module, terms in self._linears.items()}
        return VariantTerms(digest, linears, self._experts, self._embeddings, self._vectors)

    def _check_new(self, name: str, known: bool) -> None:
        if known:
            raise CheckpointError(
                f"{self._source} changes {name} in two ways that exclude each other; remove one of them from "
                "target_modules, target_parameters, modules_to_save or trainable_token_indices"
            )


def scaled(tensor: Tensor, scale: float | Tensor) -> Tensor:
    """tensor * scale, in the tensor's dtype where that is exact, else in float32."""
    if isinstance(scale, float) and scale == 1.0:
        return tensor
    product = tensor.float() * scale
    if tensor.dtype == torch.float32:
        return product
    rounded = product.to(tensor.dtype)
    return rounded if torch.equal(rounded.float(), product) else product

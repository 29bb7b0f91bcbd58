"""Collects the terms of a variant while the parts of its files are read one after the other."""

from __future__ import annotations

import torch
from torch import Tensor

from delta.variant_terms import EmbeddingTerms, LinearTerms, VariantTerms


class TermsBuilder:
    """Each term of a module is given once; only biases add up."""

    def __init__(self) -> None:
        self._linears: dict[str, dict[str, Tensor]] = {}
        self._experts: dict[str, dict[int, LinearTerms]] = {}
        self._embeddings: dict[str, EmbeddingTerms] = {}
        self._vectors: dict[str, Tensor] = {}

    def add_linear(self, module: str, **terms: Tensor) -> None:
        """`terms` are those of LinearTerms."""
        known = self._linears.setdefault(module, {})
        for name, tensor in terms.items():
            assert name == "bias" or name not in known, f"{name} of {module} is given twice"
            known[name] = known[name].float() + tensor.float() if name in known else tensor

    def add_expert(self, parameter: str, index: int, terms: LinearTerms) -> None:
        of_parameter = self._experts.setdefault(parameter, {})
        assert index not in of_parameter, f"expert {index} of {parameter} is given twice"
        of_parameter[index] = terms

    def add_embedding(self, module: str, terms: EmbeddingTerms) -> None:
        assert module not in self._embeddings, f"{module} is given twice"
        self._embeddings[module] = terms

    def add_table(self, module: str, table: Tensor) -> None:
        """All rows of an embedding are replaced. table [V, H]"""
        self.add_embedding(module, EmbeddingTerms(token_ids=torch.arange(len(table)), rows=table))

    def add_vector(self, parameter: str, vector: Tensor) -> None:
        assert parameter not in self._vectors, f"{parameter} is given twice"
        self._vectors[parameter] = vector

    def build(self, digest: str) -> VariantTerms:
        linears = {module: LinearTerms(**terms) for module, terms in self._linears.items()}
        return VariantTerms(digest, linears, self._experts, self._embeddings, self._vectors)


def scaled(tensor: Tensor, scale: float | Tensor) -> Tensor:
    """tensor * scale, in the tensor's dtype where that is exact, else in float32."""
    product = tensor.float() * scale
    rounded = product.to(tensor.dtype)
    return rounded if torch.equal(rounded.float(), product) else product

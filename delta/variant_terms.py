"""What a fine-tune changes in its base, module by module, ready to be applied and independent of any file format.

    linear      y = e ∘ ((d ∘ x) Wᵀ) + b + (x Aᵀ) Bᵀ + x Zᵀ + c          W [N, K], b [N]: the base's
    embedding   row i of the base, or a replacement for it, plus  B A[:, i]
    vector      a replacement

Modules and parameters have the names that transformers gives them in the causal language model, as in
"model.layers.0.self_attn.q_proj". All terms of a module are optional. Source of the operator: VARIANTS in the design
documents; LoRA arXiv 2106.09685, DoRA arXiv 2402.09353, (IA)3 arXiv 2205.05638.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields

from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class LinearTerms:
    """Terms of a linear layer with W [N, K], whichever way the checkpoint stores it.

    Attributes:
        a: [r, K], and
        b: [N, r] with all scales folded in; both or none.
        output_scale: e [N].
        input_scale: d [K].
        dense: Z [N, K].
        bias: c [N].
    """

    a: Tensor | None = None
    b: Tensor | None = None
    output_scale: Tensor | None = None
    input_scale: Tensor | None = None
    dense: Tensor | None = None
    bias: Tensor | None = None

    def __post_init__(self) -> None:
        assert (self.a is None) == (self.b is None)
        assert self.a is None or self.b is None or self.a.shape[0] == self.b.shape[1]

    @property
    def rank(self) -> int:
        return 0 if self.a is None else self.a.shape[0]

    @property
    def adds_only(self) -> bool:
        """The base's own product stays as it is, so that several variants can be added up."""
        return self.output_scale is None and self.input_scale is None


@dataclass(frozen=True, slots=True, eq=False)
class EmbeddingTerms:
    """Terms of an embedding [V, H].

    Attributes:
        token_ids: [n] int64, ascending: rows that are replaced by
        rows: [n, H]; both or none.
        a: [r, V], and
        b: [H, r] with all scales folded in; both or none.
    """

    token_ids: Tensor | None = None
    rows: Tensor | None = None
    a: Tensor | None = None
    b: Tensor | None = None

    def __post_init__(self) -> None:
        assert (self.token_ids is None) == (self.rows is None)
        assert (self.a is None) == (self.b is None)

    @property
    def adds_only(self) -> bool:
        return self.token_ids is None


@dataclass(frozen=True, slots=True, eq=False)
class VariantTerms:
    """A fine-tune in memory.

    Attributes:
        digest: "sha256:...", identity of the fine-tune's files.
        linears: by module.
        experts: by the parameter that holds the weights of all experts, [E, N, K]: the terms of each one that has some.
        embeddings: by module.
        vectors: by parameter; same shape as the base's.
    """

    digest: str
    linears: Mapping[str, LinearTerms] = field(default_factory=dict)
    experts: Mapping[str, Mapping[int, LinearTerms]] = field(default_factory=dict)
    embeddings: Mapping[str, EmbeddingTerms] = field(default_factory=dict)
    vectors: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors())

    @property
    def max_rank(self) -> int:
        return max((terms.rank for terms in self._all_linears()), default=0)

    @property
    def num_modules(self) -> int:
        return len(self.linears) + len(self.experts) + len(self.embeddings) + len(self.vectors)

    @property
    def adds_only(self) -> bool:
        """It can be added to others of its kind."""
        return not self.vectors and all(terms.adds_only for terms in self._parts())

    def tensors(self) -> Iterator[Tensor]:
        for terms in self._parts():
            for part in fields(terms):
                if (tensor := getattr(terms, part.name)) is not None:
                    yield tensor
        yield from self.vectors.values()

    def _parts(self) -> Iterator[LinearTerms | EmbeddingTerms]:
        yield from self._all_linears()
        yield from self.embeddings.values()

    def _all_linears(self) -> Iterator[LinearTerms]:
        yield from self.linears.values()
        for of_expert in self.experts.values():
            yield from of_expert.values()

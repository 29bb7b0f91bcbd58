"""What a fine-tune changes in its base, module by module, ready to be applied and independent of any file format.

    linear      y = e ∘ ((d ∘ x) Wᵀ) + b + Σ u ∘ ((v ∘ x) Sᵀ) + (x Aᵀ) Bᵀ + x Zᵀ + c      W [N, K], b [N]: the base's
    embedding   row i of the base, or a replacement for it, plus  B A[:, i]  plus  Σ u[i] (v ∘ S[i])
    vector      a replacement

A fine-tune with more tokens than its base has further rows in the input embedding and the output head. They stand for
themselves: none of the other terms reaches them.

Modules and parameters have the names that transformers gives them in the causal language model, as in
"model.layers.0.self_attn.q_proj". All terms of a module are optional. Source of the operator: VARIANTS in the design
documents; LoRA arXiv 2106.09685, DoRA arXiv 2402.09353, (IA)3 arXiv 2205.05638, signs arXiv 2402.10193.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class SignPlane:
    """u ∘ (S ∘ v): a matrix [N, K] of one bit a number, S of -1 and +1, with scales of its rows and columns.

    A ternary matrix is two planes of half its scales: they agree where it is not 0.

    Attributes:
        bits: [N, ceil(K / 8)] uint8; bit k % 8 of byte k // 8, the lowest first, is 1 where S is +1, and 0 beyond K.
        row_scale: u [N] float32.
        column_scale: v [K] float32; None: all 1.
    """

    bits: Tensor
    row_scale: Tensor
    column_scale: Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False)
class SparseMatrix:
    """A matrix [N, K] by the numbers that are not 0, row after row.

    Attributes:
        row_starts: [N + 1] int64; those of row n are [row_starts[n], row_starts[n + 1]).
        columns: [nnz] int32, ascending in each row.
        values: [nnz]
    """

    row_starts: Tensor
    columns: Tensor
    values: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class LinearTerms:
    """Terms of a linear layer with W [N, K], whichever way the checkpoint stores it.

    Attributes:
        a: [r, K], and
        b: [N, r] with all scales folded in; both or none.
        output_scale: e [N].
        input_scale: d [K].
        dense: Z [N, K], or
        sparse: the same where most of it is 0; at most one of both.
        bias: c [N].
        signs: planes u, S, v of [N, K].
        extra_rows: [E, K], and
        extra_bias: [E], where the layer has a bias: of the outputs N … N + E - 1, which the base does not have.
    """

    a: Tensor | None = None
    b: Tensor | None = None
    output_scale: Tensor | None = None
    input_scale: Tensor | None = None
    dense: Tensor | None = None
    bias: Tensor | None = None
    signs: tuple[SignPlane, ...] = ()
    sparse: SparseMatrix | None = None
    extra_rows: Tensor | None = None
    extra_bias: Tensor | None = None

    def __post_init__(self) -> None:
        assert (self.a is None) == (self.b is None)
        assert self.a is None or self.b is None or self.a.shape[0] == self.b.shape[1]
        assert self.dense is None or self.sparse is None

    @property
    def rank(self) -> int:
        return 0 if self.a is None else self.a.shape[0]

    @property
    def adds_only(self) -> bool:
        """The base's own product stays as it is, so that several variants can be added up."""
        return self.output_scale is None and self.input_scale is None and self.extra_rows is None


@dataclass(frozen=True, slots=True, eq=False)
class EmbeddingTerms:
    """Terms of an embedding [V, H].

    Attributes:
        token_ids: [n] int64, ascending: rows that are replaced by
        rows: [n, H]; both or none.
        a: [r, V], and
        b: [H, r] with all scales folded in; both or none.
        signs: planes of [V, H]; rows that are replaced have nothing added to them.
        extra_rows: [E, H], the rows V … V + E - 1, which the base does not have.
    """

    token_ids: Tensor | None = None
    rows: Tensor | None = None
    a: Tensor | None = None
    b: Tensor | None = None
    signs: tuple[SignPlane, ...] = ()
    extra_rows: Tensor | None = None

    def __post_init__(self) -> None:
        assert (self.token_ids is None) == (self.rows is None)
        assert (self.a is None) == (self.b is None)

    @property
    def adds_only(self) -> bool:
        return self.token_ids is None and self.extra_rows is None


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
    def num_extra_tokens(self) -> int:
        """By which its vocabulary is larger than the base's; the embedding and the head have as many rows more."""
        return max((len(terms.extra_rows) for terms in self._parts() if terms.extra_rows is not None), default=0)

    @property
    def adds_only(self) -> bool:
        """It can be added to others of its kind."""
        return not self.vectors and all(terms.adds_only for terms in self._parts())

    def tensors(self) -> Iterator[Tensor]:
        for terms in self._parts():
            yield from _tensors_of(terms)
        yield from self.vectors.values()

    def _parts(self) -> Iterator[LinearTerms | EmbeddingTerms]:
        yield from self._all_linears()
        yield from self.embeddings.values()

    def _all_linears(self) -> Iterator[LinearTerms]:
        yield from self.linears.values()
        for of_expert in self.experts.values():
            yield from of_expert.values()


def _tensors_of(part: object) -> Iterator[Tensor]:
    """All tensors of a dataclass, of those in it, and of tuples of them."""
    if isinstance(part, Tensor):
        yield part
    elif isinstance(part, tuple):
        for item in part:
            yield from _tensors_of(item)
    elif is_dataclass(part):
        for attribute in fields(part):
            yield from _tensors_of(getattr(part, attribute.name))

"""The terms of one variant, put together for the layers of a decoder, in the memory where they are computed."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Flag, auto

from torch import Tensor

from delta.variant_terms import EmbeddingTerms, SparseMatrix
from model_worker.engine.layers.variants import ExpertsTerms
from model_worker.engine.ops.low_rank import Factors
from model_worker.engine.ops.sign_matmul import SignMatrix


class TermKind(Flag):
    """What a variant changes, or the variants of a step."""

    LOW_RANK = auto()
    SIGNS = auto()
    NORMS = auto()
    OUTPUT_SCALES = auto()  # and biases
    INPUT_SCALES = auto()
    DENSE = auto()
    SPARSE = auto()
    EMBEDDING = auto()
    EXPERTS = auto()


NO_TERMS = TermKind(0)
MATRICES = TermKind.DENSE | TermKind.SPARSE


@dataclass(frozen=True, slots=True, eq=False)
class FusedTerms:
    """Terms of a fused layer, where it is computed; its parts are in the order of its outputs.

    Attributes:
        factors: of each part, or None.
        planes: of each part.
        dense: Z of each part, or None.
        sparse: the same where most of it is 0.
        input_scale: d [K] float32; only layers of one part have one.
        scale: e [N] float32; None: all 1.
        shift: f [N] float32.
    """

    factors: tuple[Factors | None, ...]
    planes: tuple[tuple[SignMatrix, ...], ...]
    dense: tuple[Tensor | None, ...]
    sparse: tuple[SparseMatrix | None, ...]
    input_scale: Tensor | None = None
    scale: Tensor | None = None
    shift: Tensor | None = None

    @property
    def kinds(self) -> TermKind:
        found = NO_TERMS
        for kind, has in (
            (TermKind.LOW_RANK, any(pair is not None for pair in self.factors)),
            (TermKind.SIGNS, any(self.planes)),
            (TermKind.OUTPUT_SCALES, self.scale is not None or self.shift is not None),
            (TermKind.INPUT_SCALES, self.input_scale is not None),
            (TermKind.DENSE, any(matrix is not None for matrix in self.dense)),
            (TermKind.SPARSE, any(matrix is not None for matrix in self.sparse)),
        ):
            if has:
                found |= kind
        return found

    @property
    def max_rank(self) -> int:
        return max((len(pair.a) for pair in self.factors if pair is not None), default=0)

    @property
    def max_planes(self) -> int:
        return max(map(len, self.planes))


@dataclass(slots=True, eq=False)
class BoundTerms:
    """Terms of a variant, where they are computed.

    Attributes:
        linears: by the key of the fused layer.
        norms: by the key of the norm; weights like its own.
        experts: by the key of the experts.
        embedding: `a` is [V, r]; the given rows are those of `given_rows`. None: the embedding is the base's.
    """

    linears: dict[str, FusedTerms] = field(default_factory=dict)
    norms: dict[str, Tensor] = field(default_factory=dict)
    experts: dict[str, ExpertsTerms] = field(default_factory=dict)
    embedding: EmbeddingTerms | None = None

    @property
    def kinds(self) -> TermKind:
        found = TermKind.NORMS if self.norms else NO_TERMS
        if self.experts:
            found |= TermKind.EXPERTS
        if self.embedding is not None:
            found |= TermKind.EMBEDDING
        for terms in self.linears.values():
            found |= terms.kinds
        return found

    @property
    def max_rank(self) -> int:
        return max((terms.max_rank for terms in self.linears.values()), default=0)

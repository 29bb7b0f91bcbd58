"""What the variants of a step's rows change in the layers of a decoder.

    linear      y = e ∘ ((d ∘ x) Wᵀ + b) + f + Σ u ∘ ((v ∘ x) Sᵀ) + (x Aᵀ) Bᵀ + x Zᵀ,   f = b - e ∘ b + c
    norm        another weight
    embedding   replaced rows, low-rank terms, planes of signs
    experts     for each of a mixture what a linear layer may have; never in graphs, see `VariantExperts`

Terms are those of `delta.variant_terms`, for a fused layer put together when they are bound; so the base's product is
the same whether rows have variants or not. On GPUs terms are found by their addresses, which lie in tables of the
device under the number of the variant: nothing of a step but the numbers of its rows' variants has to be sent there,
and a captured graph serves any mix. Matrices Z are the exception: outside graphs, where there may be many rows, torch
multiplies with them segment by segment. Signs of long segments are merged with W: `merged_rows.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from delta.merge_terms import signs_to_dense
from delta.variant_terms import EmbeddingTerms, SignPlane
from model_worker.engine.layers.bound_terms import MATRICES, BoundTerms, FusedTerms, TermKind
from model_worker.engine.layers.fused_linear import FusedLinear
from model_worker.engine.layers.merged_rows import MIN_OUTPUTS, MergedRows
from model_worker.engine.layers.sparse import sparse_product
from model_worker.engine.layers.variants import ExpertsTerms
from model_worker.engine.ops.embedding_terms.functional import EmbeddingTable, embed_rows
from model_worker.engine.ops.low_rank import Factors, LowRankFactors, SegmentPlan, add_low_rank
from model_worker.engine.ops.matrix_terms.functional import add_matrices
from model_worker.engine.ops.rms_norm.functional import RowWeights
from model_worker.engine.ops.row_scales.functional import scale_rows
from model_worker.engine.ops.sign_matmul import LayerSigns, add_signs, merged_linear


@dataclass(frozen=True, slots=True, eq=False)
class StepTables:
    """The tables of the device, as the rows of one step or graph use them.

    Attributes:
        low_rank: by the key of a fused layer, [parts, variants, columns] of `ops/low_rank`.
        signs: by the key of a fused layer, [parts, variants, planes, columns] of `ops/sign_matmul`.
        matrices: by the key of a fused layer, [parts, variants, columns] of `ops/matrix_terms`.
        output_scales, input_scales: by the key of a fused layer, [variants, columns] of `ops/row_scales`.
        norms: [norms, 1 + variants] int64, addresses of weights; 0: the norm's own, as for the base, number 0.
        norm_places: rows of `norms` by the key of the norm.
        embedding: with the numbers [T] of the rows' variants, plus 1; 0: the base.
    """

    low_rank: Mapping[str, Tensor]
    signs: Mapping[str, Tensor]
    matrices: Mapping[str, Tensor]
    output_scales: Mapping[str, Tensor]
    input_scales: Mapping[str, Tensor]
    norms: Tensor
    norm_places: Mapping[str, int]
    embedding: EmbeddingTable

    @property
    def numbers(self) -> Tensor:
        return self.embedding.numbers


class RowTerms:
    """What layers ask in a step in which rows have variants.

    Args:
        plan: of the step; with tiles where there are tables.
        kinds: that any of the rows has.
        bound: terms of each segment of the plan.
        tables: None on CPUs.
        in_graph: everything is found in tables; there are no segments.
        merged: rows whose planes of signs are merged with the base's weight; None: no rows.
    """

    def __init__(
        self,
        plan: SegmentPlan,
        kinds: TermKind,
        bound: Sequence[BoundTerms],
        tables: StepTables | None,
        *,
        in_graph: bool = False,
        merged: MergedRows | None = None,
    ) -> None:
        self.plan = plan
        self.kinds = kinds
        self._bound = bound
        self._tables = tables
        self._in_graph = in_graph
        self._merged = merged
        self._addresses: Tensor | None = None  # of norms' weights [norms, T]

    def begin(self) -> None:
        """Called in each step, before any layer: what is to be done on the device once for all of them."""
        if self._tables is not None and TermKind.NORMS in self.kinds:
            self._addresses = self._tables.norms.index_select(1, self._tables.numbers)

    def norm(self, key: str) -> RowWeights | None:
        """See `NormTerms.norm`."""
        if TermKind.NORMS not in self.kinds:
            return None
        if self._tables is not None:
            assert self._addresses is not None
            return RowWeights((), self._addresses[self._tables.norm_places[key]])
        segments = tuple(
            (start, end, terms.norms[key])
            for (start, end), terms in zip(self.plan.bounds, self._bound, strict=True)
            if key in terms.norms
        )
        return RowWeights(segments) if segments else None

    def embed(self, input_ids: Tensor, x: Tensor, weight: Tensor) -> None:
        """See `EmbeddingTerms.embed` of the embedding."""
        if TermKind.EMBEDDING not in self.kinds:
            return
        if self._tables is not None:
            embed_rows(input_ids, x, self._tables.embedding)
            return
        for (start, end), terms in zip(self.plan.bounds, self._bound, strict=True):
            if terms.embedding is not None:
                x[start:end] = _embedded(input_ids[start:end], weight, terms.embedding)

    def experts(self, key: str) -> list[tuple[slice, ExpertsTerms]]:
        """See `MixtureTerms.experts`."""
        if TermKind.EXPERTS not in self.kinds:
            return []
        return [
            (slice(start, end), terms.experts[key])
            for (start, end), terms in zip(self.plan.bounds, self._bound, strict=True)
            if key in terms.experts
        ]

    def product(self, layer: FusedLinear, x: Tensor) -> Tensor:
        """See `LinearTerms.product`."""
        x = self._scaled_input(layer, x)
        merged = self._merged_in(layer)
        if merged is None:
            return layer.method.apply(layer, x, layer.bias)
        assert layer.weight is not None
        y = x.new_empty(len(x), layer.out_features)
        signs = self._signs(layer)
        merged_linear(x, y, layer.weight, layer.bias, signs, merged.plan, num_planes=merged.num_planes)
        for start, end in merged.others:  # in place, because a step's largest output has no room beside it
            if layer.bias is None:
                torch.mm(x[start:end], layer.weight.T, out=y[start:end])
            else:
                torch.addmm(layer.bias, x[start:end], layer.weight.T, out=y[start:end])
        return y

    def _scaled_input(self, layer: FusedLinear, x: Tensor) -> Tensor:
        """x, or another tensor where rows have scales of their inputs."""
        if TermKind.INPUT_SCALES not in self.kinds or len(layer.widths) > 1:
            return x
        if self._tables is not None:
            scaled = torch.empty_like(x)
            scale_rows(x, scaled, self._tables.input_scales[layer.key], self._tables.numbers)
            return scaled
        scaled = x
        for rows, terms in self._segments(layer):
            if terms.input_scale is not None:
                scaled = x.clone() if scaled is x else scaled
                scaled[rows] *= terms.input_scale
        return scaled

    def add(self, layer: FusedLinear, x: Tensor, y: Tensor) -> None:
        """See `LinearTerms.add`."""
        if not self._in_graph and not any(layer.key in terms.linears for terms in self._bound):
            return
        if TermKind.OUTPUT_SCALES in self.kinds:
            self._scale(layer, y)
        if self.kinds & MATRICES:
            self._add_matrices(layer, x, y)
        if TermKind.LOW_RANK in self.kinds:
            add_low_rank(x, y, self._factors(layer), self.plan)
        if TermKind.SIGNS in self.kinds:
            merged = self._merged_in(layer)
            add_signs(x, y, self._signs(layer), self.plan if merged is None else merged.rest)

    def _scale(self, layer: FusedLinear, y: Tensor) -> None:
        if self._tables is not None:
            scale_rows(y, y, self._tables.output_scales[layer.key], self._tables.numbers)
            return
        for rows, terms in self._segments(layer):
            if terms.scale is not None:
                y[rows] *= terms.scale
            if terms.shift is not None:
                y[rows] += terms.shift

    def _add_matrices(self, layer: FusedLinear, x: Tensor, y: Tensor) -> None:
        if self._in_graph:
            assert self._tables is not None
            add_matrices(x, y, self._tables.matrices[layer.key], layer.widths, self.plan)
            return
        for rows, terms in self._segments(layer):
            for part, columns in enumerate(layer.columns):
                if (dense := terms.dense[part]) is not None:
                    y[rows, columns] += F.linear(x[rows], dense)
                if (sparse := terms.sparse[part]) is not None:
                    y[rows, columns] += sparse_product(x[rows], sparse)

    def _factors(self, layer: FusedLinear) -> LowRankFactors:
        if self._tables is not None:
            return LowRankFactors((), layer.widths, self._tables.low_rank[layer.key])
        nothing: tuple[Factors | None, ...] = (None,) * len(layer.widths)
        of_segments = [
            terms.linears[layer.key].factors if layer.key in terms.linears else nothing for terms in self._bound
        ]
        return LowRankFactors(tuple(zip(*of_segments, strict=True)), layer.widths)

    def _signs(self, layer: FusedLinear) -> LayerSigns:
        if self._tables is not None:
            return LayerSigns((), layer.columns, self._tables.signs[layer.key])
        of_segments = [terms.linears.get(layer.key) for terms in self._bound]
        parts = (
            tuple(() if terms is None else terms.planes[part] for terms in of_segments)
            for part in range(len(layer.columns))
        )
        return LayerSigns(tuple(parts), layer.columns)

    def _merged_in(self, layer: FusedLinear) -> MergedRows | None:
        """The merged rows, in layers that have some; their weight is there as it is."""
        merged = self._merged
        if merged is None or layer.key not in merged.keys or layer.weight is None:
            return None
        return merged if layer.out_features >= MIN_OUTPUTS else None

    def _segments(self, layer: FusedLinear) -> Iterator[tuple[slice, FusedTerms]]:
        """Rows that have terms of a layer."""
        for (start, end), terms in zip(self.plan.bounds, self._bound, strict=True):
            if layer.key in terms.linears:
                yield slice(start, end), terms.linears[layer.key]


def _embedded(tokens: Tensor, weight: Tensor, terms: EmbeddingTerms) -> Tensor:
    """Rows of a variant's embedding; those of tokens that the base does not have are given. tokens [n] -> [n, H]"""
    ids = tokens.clamp(max=len(weight) - 1)
    rows = weight[ids].float()
    for plane in terms.signs:
        rows += signs_to_dense(SignPlane(plane.bits[ids], plane.row_scale[ids], plane.column_scale), rows.shape[1])
    if terms.token_ids is not None and terms.rows is not None:
        places = torch.searchsorted(terms.token_ids, tokens).clamp_(max=len(terms.token_ids) - 1)
        given = terms.token_ids[places] == tokens
        rows = torch.where(given[:, None], terms.rows[places].float(), rows)
    if terms.a is not None and terms.b is not None:
        known = (tokens < len(weight))[:, None]
        rows += known * (terms.a[ids].float() @ terms.b.float().T)
    return rows.to(weight.dtype)

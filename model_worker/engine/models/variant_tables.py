"""The tables of a GPU in which kernels find the terms of all variants that are bound, by the numbers of these."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from model_worker.engine.layers.bound_terms import BoundTerms, FusedTerms
from model_worker.engine.layers.fused_linear import FusedLinear
from model_worker.engine.layers.rms_norm import RMSNorm
from model_worker.engine.layers.row_terms import StepTables
from model_worker.engine.ops.embedding_terms import functional as embedding_terms
from model_worker.engine.ops.low_rank import factors as low_rank
from model_worker.engine.ops.matrix_terms import functional as matrix_terms
from model_worker.engine.ops.row_scales import functional as row_scales
from model_worker.engine.ops.sign_matmul import SignMatrix, planes_table
from registry.errors import UnsupportedModelError

_MAX_PLANES = 8  # of a part of a layer

Copy = Callable[[Tensor, Tensor], None]
"""From host memory to memory of the device."""


class VariantTables:
    """Of one decoder.

    Args:
        linears, norms: all of the decoder.
        num_variants: that can be bound at once.
        num_tokens: of the embedding.
    """

    def __init__(
        self,
        linears: Sequence[FusedLinear],
        norms: Sequence[RMSNorm],
        num_variants: int,
        num_tokens: int,
        device: torch.device,
    ) -> None:
        self._linears = linears
        self._num_tokens = num_tokens
        self._parts: dict[str, slice] = {}  # of each layer, among those of all
        num_parts = 0
        for layer in linears:
            self._parts[layer.key] = slice(num_parts, num_parts + len(layer.widths))
            num_parts += len(layer.widths)
        self._norm_places = {norm.key: place for place, norm in enumerate(norms)}

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int64, device=device)

        self._low_rank = zeros(num_parts, num_variants, low_rank.TABLE_COLUMNS)
        self._no_signs = torch.cat([_sign_rows(layer, ((),) * len(layer.widths)) for layer in linears])
        self._signs = self._no_signs.to(device)[:, None].repeat(1, num_variants, 1, 1)
        self._matrices = zeros(num_parts, num_variants, matrix_terms.TABLE_COLUMNS)
        self._output_scales = zeros(len(linears), num_variants, row_scales.TABLE_COLUMNS)
        self._input_scales = zeros(len(linears), num_variants, row_scales.TABLE_COLUMNS)
        self._norms = zeros(len(norms), 1 + num_variants)
        self._embedding = zeros(num_variants, embedding_terms.TABLE_COLUMNS)
        places = {layer.key: place for place, layer in enumerate(linears)}
        self._of_base = StepTables(  # its views are those of all steps
            low_rank={key: self._low_rank[parts] for key, parts in self._parts.items()},
            signs={key: self._signs[parts] for key, parts in self._parts.items()},
            matrices={key: self._matrices[parts] for key, parts in self._parts.items()},
            output_scales={key: self._output_scales[place] for key, place in places.items()},
            input_scales={key: self._input_scales[place] for key, place in places.items()},
            norms=self._norms,
            norm_places=self._norm_places,
            embedding=embedding_terms.EmbeddingTable(self._embedding, zeros(0), num_tokens),
        )

    def enter(self, number: int, bound: BoundTerms, copy: Copy) -> None:
        """Write what kernels have to know of a variant to the rows of its number.

        Raises:
            UnsupportedModelError: more planes of signs than there are columns for.
        """
        rows = [
            torch.zeros(table[:, number].shape, dtype=torch.int64)
            for table in (self._low_rank, self._matrices, self._output_scales, self._input_scales)
        ]
        low_rank_rows, matrix_rows, output_scales, input_scales = rows
        sign_rows = self._no_signs.clone()
        for place, layer in enumerate(self._linears):
            terms = bound.linears.get(layer.key)
            if terms is None:
                continue
            parts = self._parts[layer.key]
            _write_parts(layer, terms, low_rank_rows[parts], sign_rows[parts], matrix_rows[parts])
            output_scales[place] = row_scales.table_row(terms.scale, terms.shift)
            input_scales[place] = row_scales.table_row(terms.input_scale, None)
        copy(low_rank_rows, self._low_rank[:, number])
        copy(sign_rows, self._signs[:, number])
        copy(matrix_rows, self._matrices[:, number])
        copy(output_scales, self._output_scales[:, number])
        copy(input_scales, self._input_scales[:, number])
        norms = torch.zeros(len(self._norms), dtype=torch.int64)
        for key, weight in bound.norms.items():
            norms[self._norm_places[key]] = weight.data_ptr()
        copy(norms, self._norms[:, 1 + number])
        embedding = torch.zeros(embedding_terms.TABLE_COLUMNS, dtype=torch.int64)
        if bound.embedding is not None:
            _check_planes("the embedding", len(bound.embedding.signs), embedding_terms.MAX_PLANES)
            embedding = embedding_terms.table_row(bound.embedding)
        copy(embedding, self._embedding[number])

    def of_rows(self, numbers: Tensor) -> StepTables:
        """For rows whose variants have these numbers, plus 1; 0: the base. numbers [T] integers"""
        embedding = embedding_terms.EmbeddingTable(self._embedding, numbers, self._num_tokens)
        return replace(self._of_base, embedding=embedding)


def _write_parts(layer: FusedLinear, terms: FusedTerms, low_rank_rows: Tensor, signs: Tensor, matrices: Tensor) -> None:
    """Rows of the parts of a layer."""
    signs.copy_(_sign_rows(layer, terms.planes))
    first_column = 0
    for part, width in enumerate(layer.widths):
        low_rank_rows[part] = low_rank.table_rows([terms.factors[part]], first_column)[0]
        matrices[part] = matrix_terms.table_row(terms.dense[part], terms.sparse[part], first_column, width)
        first_column += width


def _sign_rows(layer: FusedLinear, planes: Sequence[Sequence[SignMatrix]]) -> Tensor:
    """Of the parts of a layer: also without planes, they say which columns are the part's."""
    rows = []
    for of_part, columns in zip(planes, layer.columns, strict=True):
        _check_planes(layer.key, len(of_part), _MAX_PLANES)
        rows.append(planes_table(of_part, _MAX_PLANES, columns))
    return torch.stack(rows)


def _check_planes(what: str, num_planes: int, most: int) -> None:
    if num_planes > most:
        raise UnsupportedModelError(
            f"A fine-tune has {num_planes} planes of signs for {what}, the native decoder for GPUs knows up to {most}; "
            "serve the model with --model-impl transformers."
        )

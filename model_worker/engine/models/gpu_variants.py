"""Variants in the GPU decoder: their terms on the device, and the tables in which kernels find them.

    terms by module name ──bind──► terms of each fused layer, on the device ──► its number's row in all tables
    segments of a step ──plan──► tiles of rows, each with the number of its variant ──► `RowTerms`, which layers ask

Binding copies from pinned memory on a stream of its own, layer by layer, and waits for nothing; the first step that
uses the variant waits for the copies, on the device. A number is free again when nobody holds the variant.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor

from delta.variant_terms import VariantTerms
from model_worker.engine.layers.extra_head import ExtraHead
from model_worker.engine.layers.fused_linear import FusedLinear
from model_worker.engine.layers.rms_norm import RMSNorm
from model_worker.engine.layers.row_terms import NO_TERMS, TABLE_KINDS, BoundTerms, RowTerms, StepTables, TermKind
from model_worker.engine.lora.bound_variant import VariantSegments
from model_worker.engine.models.gpu_terms import TermBinder
from model_worker.engine.models.gpu_weights import WeightPlace
from model_worker.engine.ops.low_rank import SegmentPlan, table_rows, tile_table, to_device
from model_worker.engine.ops.low_rank.factors import TABLE_COLUMNS as LOW_RANK_COLUMNS
from model_worker.engine.ops.sign_matmul import planes_table
from model_worker.engine.ops.sign_matmul.sign_matrix import TABLE_COLUMNS as SIGN_COLUMNS
from registry.errors import InsufficientMemoryError, UnsupportedModelError

_MAX_PLANES = 8  # of a part of a layer
_GRAPH_MAX_RANK = 128  # of the variants of steps that a captured graph can compute
_MAX_VARIANTS = 256  # that are bound at once


class GpuVariant:
    """A `BoundVariant`.

    Attributes:
        number: in all tables.
        terms: on the device.
        kinds, max_rank: of the terms.
        extra_head: for tokens that the base does not have; None: there are none.
        num_bytes: of the terms.
    """

    def __init__(
        self,
        number: int,
        terms: BoundTerms,
        extra_head: ExtraHead | None,
        num_bytes: int,
        copied: torch.cuda.Event | None,
    ) -> None:
        self.number = number
        self.terms = terms
        self.kinds = terms.kinds
        self.max_rank = terms.max_rank
        self.extra_head = extra_head
        self.num_bytes = num_bytes
        self._copied = copied

    @property
    def num_extra_tokens(self) -> int:
        """See `BoundVariant.num_extra_tokens`."""
        return 0 if self.extra_head is None else len(self.extra_head.rows)

    def wait(self) -> None:
        """The device's work from here on comes after the terms' copies."""
        if self._copied is not None:
            self._copied.wait()
            self._copied = None


class GpuVariants:
    """The variants of one decoder.

    Args:
        linears, norms: all of the decoder.
        places: of the checkpoint's parameters.
        modules: places by the name of a module whose weight is that of another one, a tied head.
        device: of the decoder.
        dtype: of its activations.
        has_tables: kernels look terms up in tables; None: on GPUs.
    """

    def __init__(
        self,
        linears: Sequence[FusedLinear],
        norms: Sequence[RMSNorm],
        places: Mapping[str, WeightPlace],
        device: torch.device,
        *,
        dtype: torch.dtype,
        has_tables: bool | None = None,
    ) -> None:
        self._linears = linears
        self._norms = norms
        self._places = places
        self._device = device
        self._dtype = dtype
        self._has_tables = device.type != "cpu" if has_tables is None else has_tables
        self._free = list(range(_MAX_VARIANTS))[::-1]
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        if self._has_tables:
            self._make_tables()

    # ------------------------------------------------------------------------------------------ binding

    @torch.no_grad()
    def bind(self, terms: VariantTerms) -> GpuVariant:
        """See `VariantHost.bind`.

        Raises:
            InsufficientMemoryError: no number is free.
        """
        try:
            number = self._free.pop()
        except IndexError as error:
            raise InsufficientMemoryError(f"{_MAX_VARIANTS} variants are bound already, lower --max-loras.") from error
        try:
            variant = self._bind(number, terms)
        except BaseException:
            self._free.append(number)
            raise
        weakref.finalize(variant, self._free.append, number)
        return variant

    def _bind(self, number: int, terms: VariantTerms) -> GpuVariant:
        binder = TermBinder(
            self._places, self._device, dtype=self._dtype, has_bits=self._has_tables, stream=self._stream
        )
        bound = binder.bind(terms)
        if self._has_tables:
            self._enter(number, bound, binder)
        return GpuVariant(number, bound, binder.extra_head, binder.num_bytes, binder.finish())

    # ------------------------------------------------------------------------------------------ tables

    def _make_tables(self) -> None:
        self._parts: dict[str, slice] = {}  # of a layer, in the tables of all layers
        num_parts = 0
        for layer in self._linears:
            self._parts[layer.key] = slice(num_parts, num_parts + len(layer.widths))
            num_parts += len(layer.widths)
        self._low_rank = self._zeros(num_parts, _MAX_VARIANTS, LOW_RANK_COLUMNS)
        self._signs = self._zeros(num_parts, _MAX_VARIANTS, _MAX_PLANES, SIGN_COLUMNS)
        self._norm_addresses = self._zeros(len(self._norms), 1 + _MAX_VARIANTS)
        self._norm_places = {norm.key: place for place, norm in enumerate(self._norms)}

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.int64, device=self._device)

    def _enter(self, number: int, bound: BoundTerms, binder: TermBinder) -> None:
        """Write what kernels have to know of a variant to the rows of its number."""
        low_rank = torch.zeros(len(self._low_rank), LOW_RANK_COLUMNS, dtype=torch.int64)
        signs = torch.zeros(len(self._signs), _MAX_PLANES, SIGN_COLUMNS, dtype=torch.int64)
        for layer in self._linears:
            terms = bound.linears.get(layer.key)
            if terms is None:
                continue
            first_column = 0
            for part, width in enumerate(layer.widths):
                row = self._parts[layer.key].start + part
                low_rank[row] = table_rows([terms.factors[part]], first_column)[0]
                if len(terms.planes[part]) > _MAX_PLANES:
                    raise UnsupportedModelError(
                        f"{layer.key} has {len(terms.planes[part])} planes of signs in a fine-tune, the decoder knows "
                        f"up to {_MAX_PLANES}; serve the model with --model-impl transformers."
                    )
                signs[row] = planes_table(terms.planes[part], _MAX_PLANES)
                first_column += width
        norms = torch.zeros(len(self._norms), dtype=torch.int64)
        for key, weight in bound.norms.items():
            norms[self._norm_places[key]] = weight.data_ptr()
        binder.copy(low_rank, self._low_rank[:, number])
        binder.copy(signs, self._signs[:, number])
        binder.copy(norms, self._norm_addresses[:, 1 + number])

    def _tables(self, numbers: Tensor) -> StepTables:
        return StepTables(
            {key: self._low_rank[parts] for key, parts in self._parts.items()},
            {key: self._signs[parts] for key, parts in self._parts.items()},
            self._norm_addresses,
            self._norm_places,
            numbers,
        )

    # ------------------------------------------------------------------------------------------ steps

    def plan(self, segments: VariantSegments, num_rows: int) -> RowTerms | None:
        """For one step of so many rows; None: all of them are the base's."""
        if not segments:
            return None
        variants = self._ready(segments)
        bounds = tuple((segment.start, segment.end) for segment in segments)
        kinds = _kinds(variants)
        plan = SegmentPlan(num_rows, bounds, max(1, *(variant.max_rank for variant in variants)))
        tables = None
        if self._has_tables:
            plan = plan.tiled(self._device, entries=[variant.number for variant in variants])
            numbers = torch.zeros(num_rows, dtype=torch.int64)
            for (start, end), variant in zip(bounds, variants, strict=True):
                numbers[start:end] = 1 + variant.number
            tables = self._tables(to_device(numbers, self._device))
        return RowTerms(plan, kinds, [variant.terms for variant in variants], tables)

    def graph_terms(self, num_rows: int, kinds: TermKind = TABLE_KINDS) -> GraphTerms:
        """For a graph of steps of up to so many rows, whose variants have no other kinds of terms."""
        assert self._has_tables
        return GraphTerms(num_rows, kinds, self._tables(self._zeros(num_rows)), self._device)

    def _ready(self, segments: VariantSegments) -> list[GpuVariant]:
        variants = [cast(GpuVariant, segment.variant) for segment in segments]
        for variant in variants:
            variant.wait()
        return variants


class GraphTerms(RowTerms):
    """What layers ask in steps of a captured graph: static tables, which are filled before each replay.

    Args:
        num_rows: of the graph.
        kinds: that it computes.
        tables: with numbers that are its own.
        device: of the decoder.
    """

    def __init__(self, num_rows: int, kinds: TermKind, tables: StepTables, device: torch.device) -> None:
        self._tiles = torch.zeros(num_rows, 3, dtype=torch.int32, device=device)
        super().__init__(SegmentPlan(num_rows, (), _GRAPH_MAX_RANK, self._tiles), kinds, (), tables)
        self._numbers = tables.numbers
        self._device = device

    def serves(self, segments: VariantSegments) -> bool:
        """Whether a replay computes these rows."""
        variants = [cast(GpuVariant, segment.variant) for segment in segments]
        return _kinds(variants) & ~self.kinds == NO_TERMS and all(
            variant.max_rank <= _GRAPH_MAX_RANK for variant in variants
        )

    def fill(self, segments: VariantSegments) -> None:
        """The next replays compute these rows; their variants have to be held until they are done."""
        variants = [cast(GpuVariant, segment.variant) for segment in segments]
        for variant in variants:
            variant.wait()
        num_rows = self.plan.num_rows
        staging = torch.zeros(num_rows, 4, dtype=torch.int32)
        tiles = tile_table([(start, end) for start, end, _ in segments], [variant.number for variant in variants])
        if tiles:
            staging[: len(tiles), :3] = torch.tensor(tiles, dtype=torch.int32)
        for (start, end, _), variant in zip(segments, variants, strict=True):
            staging[start:end, 3] = 1 + variant.number
        sent = to_device(staging, self._device)
        self._tiles.copy_(sent[:, :3])
        self._numbers.copy_(sent[:, 3])


def _kinds(variants: Sequence[GpuVariant]) -> TermKind:
    found = NO_TERMS
    for variant in variants:
        found |= variant.kinds
    return found

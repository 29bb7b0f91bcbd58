"""Variants in the GPU decoder: their terms on the device, and the tables in which kernels find them.

    terms by module name ──bind──► terms of each fused layer, on the device ──► its number's row in all tables
    segments of a step ──plan──► tiles of rows, each with the number of its variant ──► `RowTerms`, which layers ask

Binding copies from pinned memory on a stream of its own, layer by layer, and waits for nothing; the first step that
uses the variant waits for the copies, on the device. A number is free again when nobody holds the variant.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import cast

import torch
from torch import Tensor

from delta.variant_terms import VariantTerms
from model_worker.engine.gpu_memory import binding_variants
from model_worker.engine.layers.bound_terms import NO_TERMS, BoundTerms, TermKind
from model_worker.engine.layers.extra_head import ExtraHead
from model_worker.engine.layers.fused_linear import FusedLinear
from model_worker.engine.layers.merged_rows import MIN_ROWS as MIN_MERGED_ROWS, MergedRows, SignLayers
from model_worker.engine.layers.rms_norm import RMSNorm
from model_worker.engine.layers.row_terms import RowTerms
from model_worker.engine.lora.bound_variant import VariantSegment, VariantSegments
from model_worker.engine.models.gpu_terms import TermBinder
from model_worker.engine.models.gpu_weights import WeightPlace
from model_worker.engine.models.variant_tables import VariantTables
from model_worker.engine.models.warm_up_terms import warm_up_terms
from model_worker.engine.ops.low_rank import SegmentPlan, kernel_rank, tile_table, to_device
from model_worker.engine.ops.sign_matmul import MANY_MERGED_ROWS
from registry.errors import InsufficientMemoryError

_MAX_VARIANTS = 256  # that are bound at once
_MANY_ROWS = 65  # of a segment whose tiles are those of prompts, whole and not
_WARM_UP_STEPS = {1: (1, _MANY_ROWS, MIN_MERGED_ROWS, MANY_MERGED_ROWS), 2: (MIN_MERGED_ROWS,)}
"""Rows of one variant by its planes of signs: for each kernel, and each size of its tiles."""

_MERGING_MAJOR = 9  # older tensor cores leave too few registers for `merged_linear`, newer devices too little memory
_STATIC_COLUMNS = 4  # of a graph's tables, for each row: three of a tile, and a number
_GRAPHS = (
    (TermKind.LOW_RANK, 64),
    (TermKind.LOW_RANK | TermKind.SIGNS | TermKind.NORMS | TermKind.EMBEDDING, 64),
    (~TermKind.EXPERTS, 256),
)
"""Kinds and highest rank of the graphs of a bucket: for adapters, for compressed fine-tunes, for everything.

What changes the experts of a mixture is in none of them: steps with such rows are launched kernel by kernel.
"""


class GpuVariant:
    """A `BoundVariant`.

    Attributes:
        number: in all tables, if there are any.
        terms: on the device.
        kinds, max_rank, signs: of the terms.
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
        self.signs = SignLayers.of(terms)
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
        num_tokens: of its embedding.
        places: of the checkpoint's parameters.
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
        num_tokens: int,
        has_tables: bool | None = None,
    ) -> None:
        self._places = places
        self._device = device
        self._dtype = dtype
        self._free = list(range(_MAX_VARIANTS))[::-1]
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._tables: VariantTables | None = None
        if device.type != "cpu" if has_tables is None else has_tables:
            self._tables = VariantTables(linears, norms, _MAX_VARIANTS, num_tokens, device)
        self._merges = device.type != "cuda" or torch.cuda.get_device_capability(device)[0] == _MERGING_MAJOR

    # ------------------------------------------------------------------------------------------ binding

    def on_host(self, weight: Callable[[], Tensor]) -> Tensor:
        """A weight of the base, which nobody writes any more, in float32: no step waits for the copy.

        Args:
            weight: makes it on the device.

        Raises:
            InsufficientMemoryError: the device has no memory to make it.
        """
        with binding_variants(), nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            return weight().cpu().float()

    @torch.no_grad()
    def bind(self, terms: VariantTerms) -> GpuVariant:
        """See `VariantHost.bind`.

        Raises:
            InsufficientMemoryError: no number is free.
        """
        if self._tables is None:
            return self._bind(0, terms)
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
        has_tables = self._tables is not None
        binder = TermBinder(self._places, self._device, dtype=self._dtype, has_bits=has_tables, stream=self._stream)
        bound = binder.bind(terms)
        if self._tables is not None:
            self._tables.enter(number, bound, binder.copy)
        return GpuVariant(number, bound, binder.extra_head, binder.num_bytes, binder.finish())

    @torch.no_grad()
    def warm_up(self) -> None:
        """Launch what steps outside graphs launch for variants, so that no kernel is compiled in a request."""
        parts = [(name, place.part, place.linear) for name, place in self._places.items() if place.linear is not None]
        layers = {(layer.in_features, layer.widths): layer for _, _, layer in parts}  # one of each shape
        for num_planes, steps in _WARM_UP_STEPS.items():
            terms = {
                name.removesuffix(".weight"): warm_up_terms(layer.in_features, layer.widths[part], num_planes)
                for name, part, layer in parts
                if layer in layers.values()
            }
            variant = self.bind(VariantTerms("", terms))
            for num_rows in steps:
                row_terms = self.plan((VariantSegment(0, num_rows, variant),), num_rows)
                assert row_terms is not None
                for layer in layers.values():
                    x = torch.zeros(num_rows, layer.in_features, dtype=self._dtype, device=self._device)
                    row_terms.add(layer, x, row_terms.product(layer, x))

    # ------------------------------------------------------------------------------------------ steps

    def plan(self, segments: VariantSegments, num_rows: int) -> RowTerms | None:
        """For one step of so many rows; None: all of them are the base's."""
        if not segments:
            return None
        variants = self._ready(segments)
        bounds = tuple((segment.start, segment.end) for segment in segments)
        kinds = _kinds(variants)
        max_rank = max(1, *(variant.max_rank for variant in variants))
        if self._tables is not None:
            max_rank = kernel_rank(max_rank)
        plan = SegmentPlan(num_rows, bounds, max_rank)
        tables, merged = None, None
        if self._tables is not None:
            entries = [variant.number for variant in variants]
            if TermKind.SIGNS in kinds and self._merges:
                merged = MergedRows.of(plan, [variant.signs for variant in variants], entries, self._device)
            plan = plan.tiled(self._device, entries=entries)
            numbers = torch.zeros(num_rows, dtype=torch.int32)
            for (start, end), variant in zip(bounds, variants, strict=True):
                numbers[start:end] = 1 + variant.number
            tables = self._tables.of_rows(to_device(numbers, self._device))
        return RowTerms(plan, kinds, [variant.terms for variant in variants], tables, merged=merged)

    def graph_terms(self, num_rows: int) -> tuple[GraphTerms, ...]:
        """For graphs of steps of so many rows: from the one that computes least to the one that serves the most."""
        assert self._tables is not None
        return tuple(GraphTerms(num_rows, kinds, max_rank, self._tables, self._device) for kinds, max_rank in _GRAPHS)

    def _ready(self, segments: VariantSegments) -> list[GpuVariant]:
        variants = [cast(GpuVariant, segment.variant) for segment in segments]
        for variant in variants:
            variant.wait()
        return variants


class GraphTerms(RowTerms):
    """What layers ask in steps of a captured graph: static tables, which are filled before a replay.

    Args:
        num_rows: of the graph.
        kinds, max_rank: that it computes.
        tables: of all variants.
    """

    def __init__(
        self, num_rows: int, kinds: TermKind, max_rank: int, tables: VariantTables, device: torch.device
    ) -> None:
        # The tiles, at most one for each row, then the number of each row's variant: one copy fills both.
        self._static = torch.zeros(_STATIC_COLUMNS * num_rows, dtype=torch.int32, device=device)
        tiles = self._static[: 3 * num_rows].view(num_rows, 3)
        of_rows = tables.of_rows(self._static[3 * num_rows :])
        super().__init__(SegmentPlan(num_rows, (), max_rank, tiles), kinds, (), of_rows, in_graph=True)
        self._filled: list[tuple[int, int, int]] = []  # (start, end, number) of what the tables are filled with

    def serves(self, segments: VariantSegments) -> bool:
        """Whether a replay computes these rows."""
        variants = [cast(GpuVariant, segment.variant) for segment in segments]
        return _kinds(variants) & ~self.kinds == NO_TERMS and all(
            variant.max_rank <= self.plan.max_rank for variant in variants
        )

    def fill(self, segments: VariantSegments) -> None:
        """The next replays compute these rows; their variants have to be held until they are done."""
        variants = [cast(GpuVariant, segment.variant) for segment in segments]
        for variant in variants:
            variant.wait()
        wanted = [(start, end, variant.number) for (start, end, _), variant in zip(segments, variants, strict=True)]
        if wanted == self._filled:
            return
        num_rows = self.plan.num_rows
        staging = torch.zeros(_STATIC_COLUMNS * num_rows, dtype=torch.int32, pin_memory=self._static.is_cuda)
        tiles = tile_table([(start, end) for start, end, _ in wanted], [number for _, _, number in wanted])
        if tiles:
            staging[: 3 * len(tiles)] = torch.tensor(tiles, dtype=torch.int32).flatten()
        for start, end, number in wanted:
            staging[3 * num_rows + start : 3 * num_rows + end] = 1 + number
        self._static.copy_(staging, non_blocking=True)
        self._filled = wanted


def _kinds(variants: Sequence[GpuVariant]) -> TermKind:
    found = NO_TERMS
    for variant in variants:
        found |= variant.kinds
    return found

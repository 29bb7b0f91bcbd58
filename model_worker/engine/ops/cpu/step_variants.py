"""The variants that rows of a step use, as the kernels see them; mirrored in variants.h.

    StepVariants ──► segments ──► PackedVariant ──► terms of linear i, weight of norm j, terms of the embedding

What the terms mean is in ops/lora, which also packs them. A variant's tables are made once, so that a step only lists
whose rows are where.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from model_worker.engine.layers.extra_head import ExtraHead
from model_worker.engine.ops.cpu.huge_pages import map_huge_pages
from model_worker.engine.ops.sign_planes.packed_signs import PackedSigns, SignTerms
from model_worker.engine.ops.sparse_matrix.packed_sparse import PackedSparse, SparseTerms

UNIT = 16  # outputs that have the same ranks
_ALIGNMENT = 64  # a cache line
_TILE_ROWS = 120  # of a linear layer; as in tile_terms.h


@dataclass(frozen=True, slots=True, eq=False)
class PackedLinear:
    """Terms of one linear layer with padded outputs N in the order of its packed weight. A, B and Z, dense or sparse,
    have one dtype.

    Attributes:
        a: [r, K padded to 2 UNIT] float32 or bfloat16; bfloat16 as `interleave_pairs` has it.
        b: of each unit [ranks of the unit, UNIT], one unit after the other; bfloat16 as `interleave_pairs` has it.
        units: [N / UNIT, 3] int64: where its part of b begins, its first rank, its ranks. All layers of this shape and
            these ranks, in whichever variant, have the same table, so that it stays in the processor's cache.
        output_scale: [N] float32
        input_scale: [K] float32
        dense: [N / 32, K, 32]
        bias: [N] float32
        signs, sparse: of all outputs.
    """

    a: Tensor | None = None
    b: Tensor | None = None
    units: Tensor | None = None
    output_scale: Tensor | None = None
    input_scale: Tensor | None = None
    dense: Tensor | None = None
    bias: Tensor | None = None
    signs: PackedSigns | None = None
    sparse: PackedSparse | None = None

    @property
    def rank(self) -> int:
        return 0 if self.a is None else len(self.a)

    @property
    def epilogue_bytes(self) -> int:
        """What the product's epilogue reads: all but A."""
        return sum(tensor.nbytes for tensor in _tensors(replace(self, a=None)))


@dataclass(frozen=True, slots=True, eq=False)
class PackedEmbedding:
    """Terms of an embedding [V, H]. rows, a and b have one dtype.

    Attributes:
        num_rows: V.
        token_ids: [n] int64, ascending; from V on: tokens that the base does not have.
        rows: [n, H]
        a: [V, r]
        b: [r, H]
        signs: of [V padded, H].
    """

    num_rows: int
    token_ids: Tensor | None = None
    rows: Tensor | None = None
    a: Tensor | None = None
    b: Tensor | None = None
    signs: PackedSigns | None = None


_Part = TypeVar("_Part", PackedLinear, PackedEmbedding, PackedSigns, PackedSparse)


class _LinearTerms(ctypes.Structure):
    _fields_ = (
        ("a", ctypes.c_void_p),
        ("b", ctypes.c_void_p),
        ("units", ctypes.c_void_p),
        ("output_scale", ctypes.c_void_p),
        ("input_scale", ctypes.c_void_p),
        ("dense", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("rank", ctypes.c_int64),
        ("a_stride", ctypes.c_int64),
        ("is_float32", ctypes.c_int64),
        ("signs", SignTerms),
        ("sparse", SparseTerms),
    )


class _EmbeddingTerms(ctypes.Structure):
    _fields_ = (
        ("token_ids", ctypes.c_void_p),
        ("rows", ctypes.c_void_p),
        ("a", ctypes.c_void_p),
        ("b", ctypes.c_void_p),
        ("num_rows", ctypes.c_int64),
        ("num_replaced", ctypes.c_int64),
        ("rank", ctypes.c_int64),
        ("is_float32", ctypes.c_int64),
        ("signs", SignTerms),
    )


class _Variant(ctypes.Structure):
    _fields_ = (("linears", ctypes.c_void_p), ("norms", ctypes.c_void_p), ("embedding", ctypes.c_void_p))


class PackedVariant:
    """A variant's terms in one piece of memory, with the tables by which kernels find them. A `BoundVariant`.

    Args:
        linears: by the layer's index.
        norms: weights [size] float32 by the norm's index.
        embedding: None: it has no terms.
        extra_head: for tokens that the base does not have; None: there are none.
        num_linears, num_norms: of the model.

    Attributes:
        linears, norms, embedding: the same, as views of that memory; tables of units are those that were given.
        extra_head: as given; no kernel sees it.
        num_bytes: of all that, and the tables.
        max_rank: of a linear layer.
        max_prepared: numbers that are prepared for a row of a linear layer with sign planes.
        address: of the tables.
    """

    def __init__(
        self,
        linears: Mapping[int, PackedLinear],
        norms: Mapping[int, Tensor],
        embedding: PackedEmbedding | None,
        extra_head: ExtraHead | None = None,
        *,
        num_linears: int,
        num_norms: int,
    ) -> None:
        linears = {index: linears[index] for index in sorted(linears)}  # in the order in which a step reads them
        parts: list[PackedLinear | PackedEmbedding] = [*linears.values()]
        if embedding is not None:
            parts.append(embedding)
        tensors = [tensor for part in parts for tensor in _tensors(part)]
        memory, views = _put_together([*tensors, *norms.values()])
        view = iter(views)
        self.linears = {index: _replaced(part, view) for index, part in linears.items()}
        self.embedding = None if embedding is None else _replaced(embedding, view)
        self.norms = dict(zip(norms, view, strict=True))
        self.extra_head = extra_head
        self.max_rank = max((part.rank for part in self.linears.values()), default=0)
        of_signs = (part.signs for part in self.linears.values())
        self.max_prepared = max((signs.prepared_size for signs in of_signs if signs is not None), default=0)
        self._linears = (_LinearTerms * num_linears)()
        for index, linear in self.linears.items():
            self._linears[index] = _linear_terms(linear)
        self._norms = (ctypes.c_void_p * num_norms)()
        for index, weight in self.norms.items():
            self._norms[index] = weight.data_ptr()
        self._embedding = None if self.embedding is None else _embedding_terms(self.embedding)
        self._variant = _Variant(
            ctypes.addressof(self._linears),
            ctypes.addressof(self._norms),
            None if self._embedding is None else ctypes.addressof(self._embedding),
        )
        self.num_bytes = memory.numel() + ctypes.sizeof(self._linears) + ctypes.sizeof(self._norms)
        self.num_bytes += 0 if extra_head is None else extra_head.num_bytes
        self.address = ctypes.addressof(self._variant)

    @property
    def num_extra_tokens(self) -> int:
        """Of its own, beyond the base's vocabulary."""
        return 0 if self.extra_head is None else len(self.extra_head.rows)


class PackedSegment(NamedTuple):
    """Rows [start, end) of a step use one variant."""

    start: int
    end: int
    variant: PackedVariant


class _Segment(ctypes.Structure):
    _fields_ = (("start", ctypes.c_int64), ("end", ctypes.c_int64), ("variant", ctypes.c_void_p))


class _VariantPlan(ctypes.Structure):
    _fields_ = (
        ("segments", ctypes.c_void_p),
        ("num_segments", ctypes.c_int64),
        ("t", ctypes.c_void_p),
        ("t_stride", ctypes.c_int64),
        ("prepared", ctypes.c_void_p),
        ("prepared_size", ctypes.c_int64),
        ("prepared_stride", ctypes.c_int64),
    )


class StepVariants:
    """The plan of one step; all layers use it.

    Args:
        segments: in ascending order, without overlap.
        num_rows: most rows that an operation of the step has.
        num_threads: of the team that runs it.

    Attributes:
        segments: as given.
        t: [num_rows, largest rank] float32; from each `Shrink` to the linear layer after it.
        prepared: [num_threads, rows of a tile, most numbers] float32; what sign planes want of rows. Each thread makes
            it for itself, in its own cache, for the rows of its tile.
        address: of what the kernels see.
    """

    def __init__(self, segments: Sequence[PackedSegment], num_rows: int, num_threads: int) -> None:
        self.segments = segments
        self.t = torch.empty(num_rows, max((segment.variant.max_rank for segment in segments), default=0))
        self._segments = (_Segment * len(segments))(
            *(_Segment(start, end, variant.address) for start, end, variant in segments)
        )
        max_prepared = max((segment.variant.max_prepared for segment in segments), default=0)
        self.prepared = torch.empty(num_threads, min(num_rows, _TILE_ROWS), max_prepared)
        self._plan = _VariantPlan(
            ctypes.addressof(self._segments),
            len(segments),
            *(self.t.data_ptr(), self.t.shape[1]),
            *(self.prepared.data_ptr(), self.prepared[0].numel(), max_prepared),
        )
        self.address = ctypes.addressof(self._plan)

    def epilogue_bytes(self, index: int) -> int:
        """Of the terms of a linear layer, each variant's once."""
        variants = {id(segment.variant): segment.variant for segment in self.segments}.values()
        return sum(variant.linears[index].epilogue_bytes for variant in variants if index in variant.linears)


def _tensors(part: object) -> Iterator[Tensor]:
    """All tensors of a part and of the parts in it that the variant has to itself."""
    for value in _attributes(part).values():
        if isinstance(value, Tensor):
            yield value
        else:
            yield from _tensors(value)


def _replaced(part: _Part, views: Iterator[Tensor]) -> _Part:
    """The same with the next views in place of its tensors."""
    new: dict[str, Any] = {
        name: next(views) if isinstance(value, Tensor) else _replaced(value, views)
        for name, value in _attributes(part).items()
    }
    return replace(part, **new)


def _attributes(part: Any) -> dict[str, Any]:
    names = (field.name for field in fields(part) if field.name not in ("units", "num_rows"))
    return {name: value for name in names if (value := getattr(part, name)) is not None}


def _put_together(tensors: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Copies of the tensors one after the other: their memory [n] uint8, and each of them in it."""
    starts: dict[int, int] = {}  # of each tensor, which may be there more than once
    end = 0
    for tensor in tensors:
        if id(tensor) not in starts:
            starts[id(tensor)] = end
            end += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
    memory = map_huge_pages(end)
    views = []
    for tensor in tensors:
        start = starts[id(tensor)]
        piece = memory[start : start + tensor.nbytes]
        views.append(piece.view(tensor.dtype).view(tensor.shape).copy_(tensor))
    return memory, views


def _linear_terms(part: PackedLinear) -> _LinearTerms:
    typed = part.a if part.a is not None else part.dense
    if part.sparse is not None:
        typed = part.sparse.values
    return _LinearTerms(
        *(_address(getattr(part, name)) for name, _ in _LinearTerms._fields_[:7]),
        part.rank,
        0 if part.a is None else part.a.shape[1],
        typed is not None and typed.dtype == torch.float32,
        SignTerms.of(part.signs),
        SparseTerms.of(part.sparse),
    )


def _embedding_terms(part: PackedEmbedding) -> _EmbeddingTerms:
    typed = part.rows if part.rows is not None else part.a
    return _EmbeddingTerms(
        *(_address(getattr(part, name)) for name, _ in _EmbeddingTerms._fields_[:4]),
        part.num_rows,
        0 if part.token_ids is None else len(part.token_ids),
        0 if part.b is None else len(part.b),
        typed is not None and typed.dtype == torch.float32,
        SignTerms.of(part.signs),
    )


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()

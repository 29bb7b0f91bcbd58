"""Rows of a step that are multiplied with the base's weight and their variant's planes of signs at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from model_worker.engine.layers.bound_terms import BoundTerms
from model_worker.engine.ops.low_rank import SegmentPlan
from model_worker.engine.ops.sign_matmul import MAX_MERGED_PLANES, merged_rows

MIN_ROWS = 256
"""Of a segment. Fewer leave much of a tile empty, and have their planes computed beside the base's product."""

MIN_OUTPUTS = 32
"""Of a layer. Fewer, a router's, are a small part of a tile, and take the form of its kernel that spills registers."""


@dataclass(frozen=True, slots=True, eq=False)
class SignLayers:
    """The layers in which one variant has planes of signs.

    Attributes:
        num_planes: most of a part, by the key of the layer.
        apart: keys of layers that cannot be merged: rows are scaled there, or there are too many planes.
    """

    num_planes: Mapping[str, int]
    apart: frozenset[str]

    @classmethod
    def of(cls, terms: BoundTerms) -> SignLayers:
        num_planes = {key: linear.max_planes for key, linear in terms.linears.items() if linear.max_planes}
        apart = frozenset(
            key
            for key, linear in terms.linears.items()
            if linear.scale is not None or linear.input_scale is not None or linear.max_planes > MAX_MERGED_PLANES
        )
        return cls(num_planes, apart)


@dataclass(frozen=True, slots=True, eq=False)
class MergedRows:
    """Made once for a step.

    Attributes:
        plan: of the segments that are merged, in tiles for `merged_linear`.
        rest: of the other segments, in tiles for `add_signs`.
        others: (start, end) of all rows that are in no merged segment.
        keys: of the layers in which a merged segment has planes, and all of them can be merged.
        num_planes: most of a part in these layers.
    """

    plan: SegmentPlan
    rest: SegmentPlan
    others: tuple[tuple[int, int], ...]
    keys: frozenset[str]
    num_planes: int

    @classmethod
    def of(
        cls, plan: SegmentPlan, signs: Sequence[SignLayers], entries: Sequence[int], device: torch.device
    ) -> MergedRows | None:
        """None: there are none.

        Args:
            plan: of all segments.
            signs: of each segment's variant.
            entries: of each segment in the kernels' tables.
        """
        segments = list(zip(plan.bounds, signs, entries, strict=True))
        long = [(bounds, of_variant, entry) for bounds, of_variant, entry in segments if _is_long(bounds, of_variant)]
        apart: frozenset[str] = frozenset().union(*(of_variant.apart for _, of_variant, _ in long))
        most = [
            (key, number)
            for _, of_variant, _ in long
            for key, number in of_variant.num_planes.items()
            if key not in apart
        ]
        if not most:
            return None
        num_planes = max(number for _, number in most)
        long_bounds = tuple(bounds for bounds, _, _ in long)
        tile_rows = merged_rows(sum(end - start for start, end in long_bounds), num_planes)
        rest = [(bounds, entry) for bounds, of_variant, entry in segments if not _is_long(bounds, of_variant)]
        return cls(
            plan=plan.of_segments(long_bounds).tiled(
                device, entries=[entry for _, _, entry in long], tile_rows=tile_rows
            ),
            rest=plan.of_segments([bounds for bounds, _ in rest]).tiled(device, entries=[entry for _, entry in rest]),
            others=_between(long_bounds, plan.num_rows),
            keys=frozenset(key for key, _ in most),
            num_planes=num_planes,
        )


def _is_long(bounds: tuple[int, int], signs: SignLayers) -> bool:
    return bounds[1] - bounds[0] >= MIN_ROWS and bool(signs.num_planes)


def _between(bounds: Sequence[tuple[int, int]], num_rows: int) -> tuple[tuple[int, int], ...]:
    """(start, end) of what these leave of so many rows."""
    ends = [0, *(end for _, end in bounds)]
    starts = [*(start for start, _ in bounds), num_rows]
    return tuple((end, start) for end, start in zip(ends, starts, strict=True) if end < start)

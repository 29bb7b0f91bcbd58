"""Which rows of a batch use which variant."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby

from model_worker.engine.lora.bound_variant import VariantSegment, VariantSegments
from model_worker.engine.lora.variant import Variant
from model_worker.engine.step import ScheduledSequence


def segments_of_step(scheduled: Iterable[ScheduledSequence]) -> VariantSegments:
    """Of the flat batch of all scheduled tokens; one for each variant, where they are sorted by it."""
    return _segments((item.sequence.variant, item.num_tokens) for item in scheduled)


def segments_of_rows(variants: Sequence[Variant | None]) -> VariantSegments:
    """Of rows whose variants these are."""
    return _segments((variant, 1) for variant in variants)


def _segments(runs: Iterable[tuple[Variant | None, int]]) -> VariantSegments:
    """Of runs of rows, in order."""
    segments = []
    end = 0
    for variant, group in groupby(runs, key=lambda run: run[0]):
        start, end = end, end + sum(num_rows for _, num_rows in group)
        if variant is not None:
            assert variant.bound is not None, "a sequence runs whose variant is not active"
            segments.append(VariantSegment(start, end, variant.bound))
    return tuple(segments)

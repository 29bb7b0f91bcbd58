"""Which rows of a step are merged, in which layers, and what is left to the base's product and to planes beside it."""

from __future__ import annotations

import torch

from model_worker.engine.layers.bound_terms import BoundTerms, FusedTerms
from model_worker.engine.layers.merged_rows import MIN_ROWS, MergedRows, SignLayers
from model_worker.engine.ops.low_rank import SegmentPlan
from model_worker.engine.ops.sign_matmul import SignMatrix
from tests.fakes.random_terms import random_plane

CPU = torch.device("cpu")


def _terms(*num_planes: int, scale: bool = False) -> FusedTerms:
    """Planes of each part."""
    nothing = (None,) * len(num_planes)
    plane = SignMatrix(random_plane(16, 32), 32, dtype=torch.float32, device=CPU)
    planes = tuple((plane,) * number for number in num_planes)
    return FusedTerms(nothing, planes, nothing, nothing, scale=torch.ones(16) if scale else None)


def _signs(**linears: FusedTerms) -> SignLayers:
    return SignLayers.of(BoundTerms(linears))


def _merged(bounds: list[tuple[int, int]], signs: list[SignLayers], num_rows: int) -> MergedRows | None:
    plan = SegmentPlan.of(bounds, num_rows=num_rows, max_rank=7, device=CPU)
    return MergedRows.of(plan, signs, range(10, 10 + len(bounds)), CPU)


def test_long_segments_with_planes() -> None:
    signs, adapter = _signs(qkv=_terms(1, 0, 1), output=_terms(0)), _signs(qkv=_terms(0, 0, 0))
    long = MIN_ROWS
    bounds = [(0, 1), (1, 4), (6, 6 + long), (6 + long, 6 + 2 * long), (6 + 2 * long, 6 + 3 * long + 1)]
    merged = _merged(bounds, [signs, signs, signs, adapter, signs], 8 + 3 * long)
    assert merged is not None
    assert merged.keys == {"qkv"}
    assert merged.num_planes == 1
    assert merged.plan.bounds == (bounds[2], bounds[4])
    assert merged.plan.max_rank == 7
    assert merged.plan.tiles is not None
    assert merged.plan.tiles[:, [0, 2]].tolist() == [[12, 128], [12, 128], [14, 128], [14, 128], [14, 1]]
    assert merged.rest.bounds == (bounds[0], bounds[1], bounds[3])
    assert merged.rest.tiles is not None
    assert merged.rest.tiles[:2].tolist() == [[10, 0, 1], [11, 1, 3]]
    assert merged.others == ((0, 6), (6 + long, 6 + 2 * long), (7 + 3 * long, 8 + 3 * long))


def test_layers_that_cannot_be_merged_for_one_of_them() -> None:
    first = _signs(qkv=_terms(2, 1, 1), output=_terms(1), down=_terms(1), gate_up=_terms(0, 1))
    second = _signs(qkv=_terms(1, 1, 1), output=_terms(1, scale=True), down=_terms(3))
    bounds = [(0, MIN_ROWS), (MIN_ROWS, 2 * MIN_ROWS)]
    merged = _merged(bounds, [first, second], 2 * MIN_ROWS)
    assert merged is not None
    assert merged.keys == {"qkv", "gate_up"}
    assert merged.num_planes == 2
    assert merged.others == ()


def test_nothing_to_merge() -> None:
    signs = _signs(qkv=_terms(1, 1, 1))
    assert _merged([(0, MIN_ROWS - 1)], [signs], MIN_ROWS) is None
    assert _merged([(0, MIN_ROWS)], [_signs(qkv=_terms(1, scale=True))], MIN_ROWS) is None
    assert _merged([(0, MIN_ROWS)], [_signs()], MIN_ROWS) is None


def test_many_rows_have_larger_tiles() -> None:
    one, two = _signs(qkv=_terms(1)), _signs(qkv=_terms(2))
    for signs, tile_rows in ((one, 256), (two, 128)):
        merged = _merged([(0, 1024)], [signs], 1024)
        assert merged is not None
        assert merged.plan.tile_rows == tile_rows

"""The kernels for GPUs, run by Triton's interpreter, equal the readable ones on batches of every shape."""

from __future__ import annotations

import importlib.util
import os
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from model_worker.engine.ops.low_rank import Factors, LowRankFactors, SegmentPlan, add_low_rank, table_rows
from model_worker.engine.ops.low_rank.reference import expand_reference, shrink_reference

CPU = torch.device("cpu")
_TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}

Bounds = list[tuple[int, int]]


@pytest.fixture(scope="module")
def kernels(interpreted: Callable[[str], ModuleType]) -> ModuleType:
    return interpreted("low_rank")


def _popularity(kind: str, num_rows: int, source: random.Random) -> Bounds:
    """Rows of a decoding batch by variant: its distribution as in Punica's evaluation. Some rows are the base's."""
    weights = {
        "identical": [1.0],
        "distinct": [],
        "uniform": [1.0] * 4,
        "zipf": [1 / (rank + 1) ** 1.5 for rank in range(8)],
    }[kind]
    if not weights:
        return [(row, row + 1) for row in range(num_rows)]
    counts = [0] * (len(weights) + 1)
    for choice in source.choices(range(len(counts)), [*weights, 0.5], k=num_rows):
        counts[choice] += 1
    bounds, start = [], counts[-1]  # the base's rows come first
    for count in counts[:-1]:
        bounds.append((start, start + count))  # some are empty
        start += count
    return bounds


def _factors(
    num_segments: int, num_inputs: int, widths: tuple[int, ...], ranks: list[int], dtype: torch.dtype
) -> LowRankFactors:
    """Random ones; rank 0: none."""
    chosen = iter(ranks * (num_segments * len(widths)))
    parts = []
    for width in widths:
        pairs = []
        for rank in (next(chosen) for _ in range(num_segments)):
            a, b = torch.randn(rank, num_inputs) / num_inputs**0.5, torch.randn(width, rank) / max(rank, 1) ** 0.5
            pairs.append(Factors(a.to(dtype), b.to(dtype)) if rank else None)
        parts.append(tuple(pairs))
    firsts = [sum(widths[:part]) for part in range(len(widths))]
    table = torch.stack([table_rows(part, first) for part, first in zip(parts, firsts, strict=True)])
    return LowRankFactors(tuple(parts), widths, table)


def _check(
    kernels: ModuleType,
    bounds: Bounds,
    num_rows: int,
    *,
    num_inputs: int = 48,
    widths: tuple[int, ...] = (40,),
    ranks: list[int] | None = None,
    dtype: torch.dtype = torch.float32,
    num_empty_tiles: int = 0,
) -> None:
    ranks = [8, 16, 3] if ranks is None else ranks
    factors = _factors(len(bounds), num_inputs, widths, ranks, dtype)
    plan = SegmentPlan.of(bounds, num_rows=num_rows, max_rank=max(ranks), device=CPU).tiled(CPU)
    plan = replace(plan, tiles=torch.nn.functional.pad(plan.tiles, (0, 0, 0, num_empty_tiles)))
    x, base = torch.randn(num_rows, num_inputs).to(dtype), torch.randn(num_rows, sum(widths)).to(dtype)
    expected = base.clone()
    t_expected = shrink_reference(x, factors, plan)
    expand_reference(t_expected, expected, factors, plan)
    out = base.clone()
    t = kernels.shrink(x, factors, plan)
    tolerance = _TOLERANCE[dtype]
    for part, pairs in enumerate(factors.parts):
        for (start, end), pair in zip(bounds, pairs, strict=True):
            if pair is not None:
                rank = len(pair.a)
                summed = t[:, part, start:end, :rank].sum(dim=0)
                torch.testing.assert_close(summed, t_expected[part, start:end, :rank], rtol=tolerance, atol=tolerance)
    kernels.expand(t, out, factors, plan)
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)
    in_segments = torch.zeros(num_rows, dtype=torch.bool)
    for start, end in bounds:
        in_segments[start:end] = True
    assert torch.equal(out[~in_segments], base[~in_segments])


@pytest.mark.parametrize("num_rows", [1, 8, 33])
@pytest.mark.parametrize("kind", ["identical", "distinct", "uniform", "zipf"])
def test_batches_of_every_popularity(kernels: ModuleType, kind: str, num_rows: int) -> None:
    torch.manual_seed(num_rows)
    _check(kernels, _popularity(kind, num_rows, random.Random(num_rows)), num_rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ranks", [[1], [128, 1, 16, 7], [64, 0, 65], [0]])
def test_every_rank_and_type(kernels: ModuleType, ranks: list[int], dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    _check(kernels, [(0, 1), (1, 4), (6, 7), (7, 9)], 10, ranks=ranks, dtype=dtype)


@pytest.mark.parametrize(("num_inputs", "width"), [(1, 1), (33, 17), (512, 128), (1100, 131)])
def test_every_size(kernels: ModuleType, num_inputs: int, width: int) -> None:
    torch.manual_seed(2)
    _check(kernels, [(1, 2), (2, 5)], 6, num_inputs=num_inputs, widths=(width,))


def test_prompts_of_hundreds_of_rows(kernels: ModuleType) -> None:
    torch.manual_seed(3)
    _check(kernels, [(5, 205), (205, 206), (206, 271)], 280, ranks=[16, 4, 33])


@pytest.mark.parametrize("widths", [(40, 24, 24), (150, 150), (7, 1, 300)])
def test_fused_parts_are_computed_together(kernels: ModuleType, widths: tuple[int, ...]) -> None:
    torch.manual_seed(4)
    _check(kernels, [(0, 2), (2, 3), (3, 3), (5, 8)], 9, widths=widths, ranks=[8, 0, 20, 1])


def test_tiles_without_rows_as_captured_graphs_have_them(kernels: ModuleType) -> None:
    torch.manual_seed(5)
    _check(kernels, [(0, 1), (1, 3)], 4, num_empty_tiles=7)
    _check(kernels, [], 4, num_empty_tiles=9)


def test_another_rank_is_no_other_kernel() -> None:
    """On GPUs, up to the next step of ranks; references take what there is."""
    for max_rank, known in ((0, 64), (1, 64), (8, 64), (64, 64), (65, 128)):
        plan = SegmentPlan.of([(0, 3)], num_rows=3, max_rank=max_rank, device=torch.device("meta"))
        assert plan.max_rank == known
    assert SegmentPlan.of([(0, 3)], num_rows=3, max_rank=8, device=CPU).max_rank == 8


def test_a_row_does_not_depend_on_its_neighbours(kernels: ModuleType) -> None:
    torch.manual_seed(6)
    factors = _factors(3, 700, (50,), [16, 5, 40], torch.float32)
    x, base = torch.randn(40, 700), torch.randn(40, 50)
    plan = SegmentPlan.of([(0, 1), (1, 12), (12, 40)], num_rows=40, max_rank=40, device=CPU).tiled(CPU)
    together = base.clone()
    kernels.expand(kernels.shrink(x, factors, plan), together, factors, plan)
    assert factors.table is not None
    for row, segment in ((0, 0), (5, 1), (39, 2)):
        alone = LowRankFactors(
            (factors.parts[0][segment : segment + 1],), (50,), factors.table[:, segment : segment + 1]
        )
        out = base[row : row + 1].clone()
        plan = SegmentPlan.of([(0, 1)], num_rows=1, max_rank=40, device=CPU).tiled(CPU)
        kernels.expand(kernels.shrink(x[row : row + 1], alone, plan), out, alone, plan)
        torch.testing.assert_close(out[0], together[row], rtol=1e-5, atol=1e-5)


def test_rows_may_be_part_of_something_wider(kernels: ModuleType) -> None:
    torch.manual_seed(7)
    factors = _factors(1, 20, (12,), [4], torch.float32)
    wide_x, wide_out = torch.randn(5, 30), torch.randn(5, 16)
    expected = wide_out.clone()
    plan = SegmentPlan.of([(1, 4)], num_rows=5, max_rank=4, device=CPU).tiled(CPU)
    add_low_rank(wide_x[:, :20], expected[:, :12], factors, plan)
    kernels.expand(kernels.shrink(wide_x[:, :20], factors, plan), wide_out[:, :12], factors, plan)
    torch.testing.assert_close(wide_out, expected)


def test_the_reference_is_the_formula() -> None:
    torch.manual_seed(8)
    factors = _factors(2, 6, (5, 3), [2, 4, 0, 1], torch.float32)
    x, base = torch.randn(4, 6), torch.randn(4, 8)
    out = base.clone()
    add_low_rank(x, out, factors, SegmentPlan.of([(0, 1), (2, 4)], num_rows=4, max_rank=4, device=CPU))
    expected = base.clone()
    for columns, part in ((slice(0, 5), factors.parts[0]), (slice(5, 8), factors.parts[1])):
        for rows, pair in ((slice(0, 1), part[0]), (slice(2, 4), part[1])):
            if pair is not None:
                expected[rows, columns] += x[rows] @ (pair.b @ pair.a).T
    torch.testing.assert_close(out, expected)


def test_large_values_do_not_overflow_in_between(kernels: ModuleType) -> None:
    a, b = torch.full((1, 64), 60.0).half(), torch.full((8, 1), 1e-3).half()
    pairs: tuple[Factors | None, ...] = (Factors(a, b),)
    factors = LowRankFactors((pairs,), (8,), table_rows(pairs)[None])
    plan = SegmentPlan.of([(0, 1)], num_rows=1, max_rank=1, device=CPU).tiled(CPU)
    out: Tensor = torch.zeros(1, 8).half()
    kernels.expand(kernels.shrink(torch.full((1, 64), 60.0).half(), factors, plan), out, factors, plan)
    torch.testing.assert_close(out.float(), torch.full((1, 8), 230.4), rtol=1e-3, atol=0.0)


def test_they_compile_for_a_gpu(tmp_path: Path) -> None:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    root = Path(__file__).parents[5]
    settings = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join([str(root), *sys.path])}
    settings.pop("TRITON_INTERPRET", None)
    script = Path(__file__).with_name("compile_for_gpu.py")
    done = subprocess.run([sys.executable, script], env=settings, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

"""How fast a GPU copies memory and multiplies matrices; what programs on it are compared with."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from gpu_checkpoint import DEVICE

_COPIED_BYTES = 4 << 30
_MATRIX = 8192
_WARM_UP, _REPEATS = 3, 15  # runs


@dataclass(frozen=True, slots=True)
class Ceilings:
    """Attributes:
    copy_bytes_s: read and written, by a copy on the device.
    bf16_flops: of a product of large bfloat16 matrices, a second.
    """

    copy_bytes_s: float
    bf16_flops: float


def measure_ceilings() -> Ceilings:
    """Takes about a second and 8 GiB of the GPU's memory, which are given back."""
    ceilings = Ceilings(2 * _COPIED_BYTES / _copy_s(), 2 * _MATRIX**3 / _matmul_s())
    torch.cuda.empty_cache()
    return ceilings


def _copy_s() -> float:
    source = torch.empty(_COPIED_BYTES, dtype=torch.uint8, device=DEVICE).random_()
    target = torch.empty_like(source)
    return median_s(lambda: target.copy_(source))


def _matmul_s() -> float:
    a, b = torch.randn(2, _MATRIX, _MATRIX, device=DEVICE, dtype=torch.bfloat16).unbind(0)
    out = torch.empty_like(a)
    return median_s(lambda: torch.matmul(a, b, out=out))


def median_s(run: Callable[[], object]) -> float:
    """Seconds that the GPU works on what `run` launches: the median of several runs, by events."""
    for _ in range(_WARM_UP):
        run()
    times_s = []
    for _ in range(_REPEATS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        end.synchronize()
        times_s.append(begin.elapsed_time(end) / 1000)
    return statistics.median(times_s)


def replayed_s(run: Callable[[], object]) -> float:
    """Seconds that the GPU works on what `run` launches, captured in a graph, so that launching does not count."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return median_s(graph.replay)

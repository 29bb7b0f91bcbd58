"""The rows of a step by segments, and in tiles for kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

_FEW_ROWS = 16  # the least that tensor cores multiply: decoding
_MANY_ROWS = 64
_RANK_STEP = 64  # steps of ranks up to this have the same kernels, those of graphs


@dataclass(frozen=True, slots=True, eq=False)
class SegmentPlan:
    """Made once for a step.

    Attributes:
        num_rows: T of the step.
        bounds: (start, end) of each segment, ascending, without overlap; a segment may be empty.
        max_rank: no factor of the step has a higher rank; at least 1.
        tiles: [num_tiles, 3] int32 on the device: segment, or its entry in the kernels' tables; first row; number of
            rows (0: nothing to do). None on CPUs: the references need no tiles.
        tile_rows: most rows of a tile.
    """

    num_rows: int
    bounds: tuple[tuple[int, int], ...]
    max_rank: int
    tiles: Tensor | None = None
    tile_rows: int = _FEW_ROWS

    @classmethod
    def of(
        cls, bounds: Sequence[tuple[int, int]], *, num_rows: int, max_rank: int, device: torch.device
    ) -> SegmentPlan:
        """The plan for a device."""
        if device.type == "cpu":
            return cls(num_rows, tuple(bounds), max(1, max_rank))
        return cls(num_rows, tuple(bounds), kernel_rank(max_rank)).tiled(device)

    def tiled(
        self,
        device: torch.device,
        entries: Sequence[int] | None = None,
        tile_rows: int | None = None,
    ) -> SegmentPlan:
        """With tiles.

        Args:
            entries: of each segment in the kernels' tables; None: the segments are numbered.
            tile_rows: most rows of a tile; None: what suits the longest segment.
        """
        longest = max((end - start for start, end in self.bounds), default=0)
        tile_rows = tile_rows or (_FEW_ROWS if longest <= _FEW_ROWS else _MANY_ROWS)
        tiles = tile_table(self.bounds, entries or range(len(self.bounds)), tile_rows)
        tensor = torch.tensor(tiles, dtype=torch.int32).view(-1, 3)
        return replace(self, tiles=to_device(tensor, device), tile_rows=tile_rows)

    def of_segments(self, bounds: Sequence[tuple[int, int]]) -> SegmentPlan:
        """Of some of the segments, without tiles."""
        return replace(self, bounds=tuple(bounds), tiles=None)


def kernel_rank(max_rank: int) -> int:
    """What kernels are told of the ranks of a step, so that another rank is no other kernel."""
    return max(1, -(-max_rank // _RANK_STEP)) * _RANK_STEP


def tile_table(
    bounds: Sequence[tuple[int, int]], entries: Sequence[int], tile_rows: int = _FEW_ROWS
) -> list[tuple[int, int, int]]:
    """(entry, first row, number of rows) of the tiles of each segment."""
    return [
        (entry, first, min(tile_rows, end - first))
        for entry, (start, end) in zip(entries, bounds, strict=True)
        for first in range(start, end, tile_rows)
    ]


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy that nothing waits for."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)

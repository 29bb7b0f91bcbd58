"""The low-rank factors that the segments of a step have in one layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

TABLE_COLUMNS = 5
"""Address of A, address of B, rank, first of the output's columns, and how many they are."""

_ALIGNMENT_BYTES = 16


class Factors(NamedTuple):
    """a [r, K], b [N, r]"""

    a: Tensor
    b: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class LowRankFactors:
    """Of one layer, for each part and each segment.

    Attributes:
        parts: [P][S]; None: the part has no such term in that segment. Not looked at where there is a table.
        widths: [P], columns of each part.
        table: [P, entries, TABLE_COLUMNS] int64 on the device, see `table_rows`; an entry for each segment, or those
            that the plan's tiles name. None on CPUs.
    """

    parts: tuple[tuple[Factors | None, ...], ...]
    widths: tuple[int, ...]
    table: Tensor | None = None


def table_rows(factors: Sequence[Factors | None], first_column: int = 0) -> Tensor:
    """What kernels have to know of each, for a part that begins at this column. -> [len(factors), TABLE_COLUMNS] int64

    The addresses hold as long as the factors live. A row of zeros, as of None, says that there is no term.
    """
    rows = torch.zeros(len(factors), TABLE_COLUMNS, dtype=torch.int64)
    for row, pair in zip(rows, factors, strict=True):
        if pair is not None:
            a, b = pair
            assert a.is_contiguous() and b.is_contiguous()  # noqa: PT018
            assert (a.data_ptr() | b.data_ptr()) % _ALIGNMENT_BYTES == 0
            row.copy_(torch.tensor([a.data_ptr(), b.data_ptr(), a.shape[0], first_column, b.shape[0]]))
    return rows

"""A sparse matrix in the order in which the kernels read it.

    columns, values   [unit][i][16]      number i of each of the unit's 16 outputs

A unit is 16 outputs in the order of the base's packed weight. Its outputs are filled up to the one that has most
numbers, with zeros in the last column that any has.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class PackedSparse:
    """A matrix [N padded, K].

    Attributes:
        starts: [N / UNIT + 1] int64: [starts[i], starts[i + 1]) are those of unit i.
        columns: [starts[-1], UNIT] int32, not descending for each output.
        values: [starts[-1], UNIT] float32 or bfloat16
    """

    starts: Tensor
    columns: Tensor
    values: Tensor


class SparseTerms(ctypes.Structure):
    """Mirrored in ops/cpu/variants.h."""

    _fields_ = (("starts", ctypes.c_void_p), ("columns", ctypes.c_void_p), ("values", ctypes.c_void_p))

    @classmethod
    def of(cls, matrix: PackedSparse | None) -> SparseTerms:
        if matrix is None:
            return cls()
        return cls(matrix.starts.data_ptr(), matrix.columns.data_ptr(), matrix.values.data_ptr())

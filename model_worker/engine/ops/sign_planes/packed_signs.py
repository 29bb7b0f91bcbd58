"""Sign planes in the order in which the kernels read them.

    blocks   [unit][plane of the unit]  { u[16] float32, words[ceil(K / 32)][16] }

A unit is 16 outputs in the order of the base's packed weight. Bit i of words[w][n] is 1 where S is +1 for output n and
input 32 w + i; it is 0 beyond K. A unit has the planes of the parts (q, k, v, ...) that any of its outputs belong to;
u is 0 for the others. Planes whose v are the same share it.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

from torch import Tensor

WORD = 32  # inputs
_PREPARED = 4  # at most, numbers that a kernel prepares for each input


@dataclass(frozen=True, slots=True, eq=False)
class PackedSigns:
    """All planes of a linear layer with padded outputs N, or of an embedding.

    Attributes:
        blocks: [planes of all units, 1 + words, UNIT] int32; the first of each u as float32's bits.
        starts: [N / UNIT + 1] int64: blocks [starts[i], starts[i + 1]) are those of unit i.
        scales: [planes of all units] int64: which of `column_scales` is the block's.
        column_scales: [num_scales, 32 words] float32.
    """

    blocks: Tensor
    starts: Tensor
    scales: Tensor
    column_scales: Tensor

    @property
    def prepared_size(self) -> int:
        """At most, float32 numbers that are prepared for a row."""
        return self.column_scales.numel() * _PREPARED


class SignTerms(ctypes.Structure):
    """Mirrored in ops/cpu/variants.h."""

    _fields_ = (
        ("blocks", ctypes.c_void_p),
        ("starts", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("column_scales", ctypes.c_void_p),
        ("num_scales", ctypes.c_int64),
        ("num_words", ctypes.c_int64),
    )

    @classmethod
    def of(cls, signs: PackedSigns | None) -> SignTerms:
        if signs is None:
            return cls()
        return cls(
            signs.blocks.data_ptr(),
            signs.starts.data_ptr(),
            signs.scales.data_ptr(),
            signs.column_scales.data_ptr(),
            len(signs.column_scales),
            signs.blocks.shape[1] - 1,
        )

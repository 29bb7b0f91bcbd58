"""A plane of signs in the form in which torch or Triton compute with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from delta.merge_terms import unpack_signs
from delta.variant_terms import SignPlane
from model_worker.engine.ops.sign_matmul.bit_planes import to_bit_planes

TABLE_COLUMNS = 4
"""Address of the bits, of u, of v, and how many blocks of bits a row of S has."""

_INT4_ROWS, _INT4_COLUMNS = 16, 32
_PLUS, _MINUS = 9, 7  # four bits are numbers minus 8
_ALIGNMENT_BYTES = 16


class SignMatrix:
    """One plane [N, K].

    On a GPU it is one bit a number. On a CPU it is four, the fewest that torch multiplies with; where the shape does
    not suit that product, it is a matrix of the dtype.

    Args:
        plane: on any device.
        num_inputs: K.
        dtype: of the rows that it is multiplied with.
        has_bits: it is one bit a number; None: on GPUs.
        move: puts a tensor on the device; None: waits for it.

    Attributes:
        bits: [N, blocks, 32] int32, on GPUs; see `bit_planes`.
        int4: what `_convert_weight_to_int4pack_for_cpu` makes of it, on CPUs.
        int4_scales: [K / group, N, 2] of 1 and 0, which change nothing.
        matrix: [N, K] of -1 and +1 where there is no such product.
        row_scale: u [N] float32.
        column_scale: v [K] float32; None, on CPUs only: all 1.
    """

    def __init__(
        self,
        plane: SignPlane,
        num_inputs: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
        has_bits: bool | None = None,
        move: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        has_bits = device.type != "cpu" if has_bits is None else has_bits
        move = partial(Tensor.to, device=device) if move is None else move
        self.num_inputs = num_inputs
        self.num_outputs = len(plane.bits)
        self.row_scale = move(plane.row_scale.float().contiguous())
        scale = plane.column_scale
        if scale is None and has_bits:
            scale = torch.ones(num_inputs)
        self.column_scale = None if scale is None else move(scale.float().contiguous())
        self.bits: Tensor | None = None
        self.int4: Tensor | None = None
        self.int4_scales: Tensor | None = None
        self.matrix: Tensor | None = None
        if has_bits:
            self.bits = move(to_bit_planes(plane.bits))
        elif self.num_outputs % _INT4_ROWS == 0 and num_inputs % _INT4_COLUMNS == 0:
            numbers = torch.where(unpack_signs(plane.bits, num_inputs), _PLUS, _MINUS).to(torch.int32)
            self.int4 = torch.ops.aten._convert_weight_to_int4pack_for_cpu(numbers, 1)
            self.int4_scales = torch.zeros(num_inputs // self.group, self.num_outputs, 2, dtype=dtype)
            self.int4_scales[..., 0] = 1
        else:
            self.matrix = torch.where(unpack_signs(plane.bits, num_inputs), 1.0, -1.0).to(dtype)

    @property
    def group(self) -> int:
        """Inputs that share one of the four-bit product's scales."""
        return next(size for size in (256, 128, 64, 32) if self.num_inputs % size == 0)

    @property
    def num_bytes(self) -> int:
        tensors = (self.bits, self.int4, self.int4_scales, self.matrix, self.row_scale, self.column_scale)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def planes_table(planes: Sequence[SignMatrix], num_planes: int) -> Tensor:
    """What kernels have to know of the planes of one segment. -> [num_planes, TABLE_COLUMNS] int64

    The addresses hold as long as the planes live. A row of zeros says that there is no further plane.
    """
    rows = torch.zeros(num_planes, TABLE_COLUMNS, dtype=torch.int64)
    for row, plane in zip(rows, planes, strict=False):
        assert plane.bits is not None
        assert plane.column_scale is not None
        addresses = [plane.bits.data_ptr(), plane.row_scale.data_ptr(), plane.column_scale.data_ptr()]
        assert all(address % _ALIGNMENT_BYTES == 0 for address in addresses)
        row.copy_(torch.tensor([*addresses, plane.bits.shape[1]]))
    return rows

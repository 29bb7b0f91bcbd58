"""A plane of signs in the form in which torch or Triton compute with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from delta.merge_terms import unpack_signs
from delta.variant_terms import SignPlane
from model_worker.engine.ops.sign_matmul.bit_planes import to_bit_planes

TABLE_COLUMNS = 6
"""Address of the bits, of u, of v, how many blocks of bits a row of S has; first of the output's columns, how many."""

_INT4_ROWS, _INT4_COLUMNS = 16, 32
_PLUS, _MINUS = 9, 7  # four bits are numbers minus 8
_ALIGNMENT_BYTES = 16


class Move(Protocol):
    """Puts tensors on a device."""

    def __call__(self, tensor: Tensor, arranged: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """The tensor, or what `arranged` makes of it there."""
        ...


class SignMatrix:
    """One plane [N, K].

    On a GPU it is one bit a number. On a CPU it is four, the fewest that torch multiplies with; where the shape does
    not suit that product, it is a matrix of the dtype.

    Args:
        plane: on any device.
        num_inputs: K.
        dtype: of the rows that it is multiplied with.
        has_bits: it is one bit a number; None: on GPUs.
        move: puts tensors on the device; None: waits for them.

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
        move: Move | None = None,
    ) -> None:
        has_bits = device.type != "cpu" if has_bits is None else has_bits
        move = partial(_moved, device) if move is None else move
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
            self.bits = move(plane.bits, to_bit_planes)
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


def _moved(device: torch.device, tensor: Tensor, arranged: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    moved = tensor.to(device)
    return moved if arranged is None else arranged(moved)


@dataclass(frozen=True, slots=True, eq=False)
class LayerSigns:
    """The planes that the segments of a step have in one layer.

    Attributes:
        parts: [P][S], planes of each part and segment. Not looked at where there is a table.
        columns: [P], of the output, that each part has.
        table: [P, entries, planes, TABLE_COLUMNS] int64 on the device, see `planes_table`; an entry for each segment,
            or those that the plan's tiles name. None on CPUs.
    """

    parts: tuple[tuple[tuple[SignMatrix, ...], ...], ...]
    columns: tuple[slice, ...]
    table: Tensor | None = None

    @property
    def widths(self) -> list[int]:
        return [columns.stop - columns.start for columns in self.columns]


def planes_table(planes: Sequence[SignMatrix], num_planes: int, columns: slice) -> Tensor:
    """What kernels have to know of the planes of one segment. -> [num_planes, TABLE_COLUMNS] int64

    The addresses hold as long as the planes live. A row without addresses says that there is no further plane.

    Args:
        columns: of the output, that the planes add to.
    """
    rows = torch.zeros(num_planes, TABLE_COLUMNS, dtype=torch.int64)
    rows[:, 4], rows[:, 5] = columns.start, columns.stop - columns.start
    for row, plane in zip(rows, planes, strict=False):
        assert plane.bits is not None
        assert plane.column_scale is not None
        addresses = [plane.bits.data_ptr(), plane.row_scale.data_ptr(), plane.column_scale.data_ptr()]
        assert all(address % _ALIGNMENT_BYTES == 0 for address in addresses)
        row[:4] = torch.tensor([*addresses, plane.bits.shape[1]])
    return rows

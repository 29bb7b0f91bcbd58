"""What the kernels for quantized weights compute at once, for each class of numbers of rows."""

from __future__ import annotations

from dataclasses import dataclass

from model_worker.engine.ops.quantized_matmul.float8_weight import Float8Weight
from model_worker.engine.ops.quantized_matmul.packed_groups import PackedGroups
from model_worker.engine.ops.tuning.tuned_table import TunedTable

OP = "quantized_matmul"
ROW_CLASSES = (1, 16, 64, 256)
"""Steps of at most so many rows have a tile of their own; all larger ones have the last."""


@dataclass(frozen=True, slots=True)
class Tile:
    """What a program computes, and with how many threads. All are powers of two but `num_stages`.

    Attributes:
        rows: at most; 1: the kernel for one row. At least 16 otherwise.
        outputs: at most; at least 16 with more rows than one.
        depth: inputs that it looks at at once; at least 32 with packed groups, 16 with float8. With one row each thread
            should have 16 bytes of an output: 1,024 for each warp of 4 bits, 512 of 8.
        num_stages: tiles that are read ahead, this one included; of no effect with one row.
    """

    rows: int
    outputs: int
    depth: int
    num_warps: int = 4
    num_stages: int = 3


@dataclass(frozen=True, slots=True)
class MatmulTiles:
    """For one weight. of_class: aligned with ROW_CLASSES."""

    of_class: tuple[Tile, ...]

    def for_rows(self, num_rows: int) -> Tile:
        return self.of_class[row_class(num_rows)]


def row_class(num_rows: int) -> int:
    """Its place in ROW_CLASSES."""
    return next((place for place, most in enumerate(ROW_CLASSES) if num_rows <= most), len(ROW_CLASSES) - 1)


def shape_class(weight_format: str, num_outputs: int, num_inputs: int, rows: int) -> str:
    """Its name in a table; rows: one of ROW_CLASSES."""
    return f"{weight_format} {num_outputs}x{num_inputs} rows {rows}"


def weight_format(weight: PackedGroups | Float8Weight) -> str:
    return f"int{weight.bits}" if isinstance(weight, PackedGroups) else "float8"


def tiles_for(weight: PackedGroups | Float8Weight, table: TunedTable) -> MatmulTiles:
    """Those of the table, and where it has none the default."""
    chosen = []
    for rows in ROW_CLASSES:
        name = shape_class(weight_format(weight), weight.num_outputs, weight.num_inputs, rows)
        tuned = table.find(OP, name)
        chosen.append(default_tile(rows, weight_format(weight)) if tuned is None else Tile(**tuned))
    return MatmulTiles(tuple(chosen))


def default_tile(rows: int, weight_format: str) -> Tile:
    """For devices and shapes that are in no table; rows: one of ROW_CLASSES. They fit the 99 KiB of small devices."""
    if rows == 1:
        return Tile(1, 8, 4096 if weight_format == "int4" else 2048)
    if rows <= 16:
        return Tile(16, 64, 128, num_stages=4)
    if rows <= 64:
        return Tile(64, 64, 64, num_stages=4)
    return Tile(128, 128, 64, num_warps=8)

"""What is tuned of products with quantized weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from itertools import product

import torch
from torch import Tensor

from compression.grouped_weight import GROUP, GroupedWeight
from model_worker.engine.ops.quantized_matmul.functional import (
    QuantizedWeight,
    pack_groups,
    quantize_float8,
    quantized_matmul,
)
from model_worker.engine.ops.quantized_matmul.tiles import (
    OP,
    ROW_CLASSES,
    MatmulTiles,
    Tile,
    default_tile,
    shape_class,
)
from model_worker.engine.ops.tuning.search import Choice, Problem

_FORMATS = ("int4", "int8", "float8")
_TOLERANCE = 2e-2  # of the norm of the difference


def quantized_problems(
    shapes: tuple[tuple[int, int], ...], device: torch.device, row_classes: tuple[int, ...] = ROW_CLASSES
) -> Iterator[Problem]:
    """For weights [N, K] of each format, and steps of as many rows as the classes have at most; in bfloat16."""
    generator = torch.Generator(device).manual_seed(0)
    for weight_format, (num_outputs, num_inputs) in product(_FORMATS, shapes):
        weight = _random_weight(weight_format, num_outputs, num_inputs, generator)
        for rows in row_classes:
            x = torch.randn(rows, num_inputs, generator=generator, device=device).bfloat16()
            expected = x.float() @ weight.dequantize().T
            yield Problem(
                OP,
                shape_class(weight_format, num_outputs, num_inputs, rows),
                candidate_tiles(rows, weight_format),
                partial(_run, x, weight),
                partial(_check, x, weight, expected),
            )


def candidate_tiles(rows: int, weight_format: str) -> tuple[Choice, ...]:
    """The default first."""
    if rows == 1:
        tiles = [Tile(1, *each) for each in product((4, 8, 16), (1024, 2048, 4096), (2, 4, 8))]
    else:
        most = min(rows, 128)
        tiles = [
            Tile(max(16, most), *each) for each in product((16, 32, 64, 128, 256), (64, 128, 256), (4, 8), (2, 3, 4))
        ]
    default = default_tile(rows, weight_format)
    return tuple(asdict(tile) for tile in [default, *(tile for tile in tiles if tile != default)])


def _run(x: Tensor, weight: QuantizedWeight, choice: Choice) -> Tensor:
    return quantized_matmul(x, weight, None, MatmulTiles((Tile(**choice),) * len(ROW_CLASSES)))


def _check(x: Tensor, weight: QuantizedWeight, expected: Tensor, choice: Choice) -> None:
    error = (_run(x, weight, choice).float() - expected).norm() / expected.norm()
    # Rows of float8 have three bits of mantissa, and a product with them as many.
    tolerance = 5e-2 if not hasattr(weight, "bits") and len(x) > ROW_CLASSES[-2] else _TOLERANCE
    assert error < tolerance, f"{choice} is wrong by {error:.3g}"


def _random_weight(
    weight_format: str, num_outputs: int, num_inputs: int, generator: torch.Generator
) -> QuantizedWeight:
    device = generator.device
    if weight_format == "float8":
        return quantize_float8(torch.randn(num_outputs, num_inputs, generator=generator, device=device))
    low, high = (0, 16) if weight_format == "int4" else (-127, 128)
    values = torch.randint(low, high, (num_outputs, num_inputs), generator=generator, device=device)
    scales = torch.rand(num_outputs, num_inputs // GROUP, generator=generator, device=device).half() / high
    minimums = scales * -7.5 if weight_format == "int4" else None
    return pack_groups(GroupedWeight(values.to(torch.int8), scales, minimums))

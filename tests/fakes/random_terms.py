"""Random terms of variants."""

from __future__ import annotations

import torch
from torch.nn import functional

from delta.variant_terms import SignPlane, SparseMatrix


def random_plane(num_outputs: int, num_inputs: int, *, scale: float = 1.0, has_columns: bool = True) -> SignPlane:
    """A plane whose products with rows of norm 1 are about as large as `scale`."""
    bits = torch.randint(0, 256, (num_outputs, -(-num_inputs // 8)), dtype=torch.uint8)
    if num_inputs % 8:
        bits[:, -1] &= (1 << num_inputs % 8) - 1
    return SignPlane(bits, torch.randn(num_outputs) * scale, torch.rand(num_inputs) + 0.5 if has_columns else None)


def random_sparse(num_outputs: int, num_inputs: int, *, share: float = 0.1, scale: float = 1.0) -> SparseMatrix:
    """A matrix this share of which is not 0; some of its rows may be empty."""
    dense = torch.randn(num_outputs, num_inputs) * scale * (torch.rand(num_outputs, num_inputs) < share)
    rows, columns = dense.nonzero(as_tuple=True)
    starts = functional.pad(torch.bincount(rows, minlength=num_outputs).cumsum(0), (1, 0))
    return SparseMatrix(starts, columns.to(torch.int32), dense[rows, columns])


def random_ternary(num_outputs: int, num_inputs: int, *, scale: float = 1.0) -> tuple[SignPlane, SignPlane]:
    """A matrix of -1, 0 and +1 with scales, as two planes of the same ones."""
    first, second = (random_plane(num_outputs, num_inputs, scale=scale / 2) for _ in range(2))
    return first, SignPlane(second.bits, first.row_scale, first.column_scale)

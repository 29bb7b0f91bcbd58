"""The largest components of a matrix, by random projections.

Source: Halko, Martinsson and Tropp, "Finding structure with randomness", arXiv 0909.4061, algorithms 4.4 and 5.1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_OVERSAMPLING = 8
_SEED = 0x5EED


@dataclass(frozen=True, slots=True, eq=False)
class SingularComponents:
    """B A, the largest first.

    Attributes:
        a: [r, K] float32, rows of which each is orthogonal to the others; a component's size is in its row.
        b: [N, r] float32, orthonormal columns.
        energies: [r] float32: the squares of the singular values.
    """

    a: Tensor
    b: Tensor
    energies: Tensor


def singular_components(matrix: Tensor, rank: int, *, num_power_iterations: int = 1) -> SingularComponents:
    """The first `rank` components, at most min(N, K) of them: the same ones for the same matrix on one machine.

    Each power iteration takes the time of the whole without any, and is worth it where the sizes fall slowly.

    matrix [N, K] float32
    """
    num_rows, num_columns = matrix.shape
    rank = min(rank, num_rows, num_columns)
    num_directions = min(rank + _OVERSAMPLING, num_rows, num_columns)
    directions = torch.randn(num_columns, num_directions, generator=torch.Generator().manual_seed(_SEED))
    basis, _ = torch.linalg.qr(matrix @ directions)  # [N, num_directions]
    for _ in range(num_power_iterations):
        directions, _ = torch.linalg.qr(matrix.T @ basis)
        basis, _ = torch.linalg.qr(matrix @ directions)
    projected = basis.T @ matrix  # [num_directions, K]
    rotation, sizes, _ = torch.linalg.svd(projected @ projected.T)
    rotation = rotation[:, :rank]
    return SingularComponents(rotation.T @ projected, basis @ rotation, sizes[:rank])

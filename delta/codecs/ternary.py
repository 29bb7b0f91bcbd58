"""`ternary`: like `sign`, but numbers that are 0 stay 0.

Fine-tunes by reinforcement learning change 5-30% of the weights, of which signs alone would change all. Source:
arXiv 2505.11711.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from delta.codecs.codec import Parts, Term
from delta.codecs.packed_bits import check_bits, pack_bits, row_blocks, unpack_bits
from delta.codecs.part_checks import check_names, check_part
from delta.codecs.sign import check_scales, fit_scales, scale_names
from delta.variant_terms import LinearTerms, SignPlane

BoolArray: TypeAlias = NDArray[np.bool_]


class Ternary:
    """D = u ∘ (S ∘ v), S of -1, 0 and +1. A `DifferenceCodec`.

    Parts: bitmap [N, ceil(K / 8)] uint8, packed like the bits of a `SignPlane`, 1 where S is not 0; positive
    [ceil(nnz / 8)] uint8, a bit for each of those, row after row: 1 where S is +1; row_scale and column_scale as in
    `sign`.
    """

    name = "ternary"

    def check(self, parts: Parts, shape: tuple[int, int]) -> None:
        check_names(parts, "bitmap", "positive", *scale_names(parts))
        check_bits(parts, "bitmap", shape)
        bitmap = parts["bitmap"]
        num_bits = sum(int(np.count_nonzero(unpack_bits(bitmap[rows], shape[1]))) for rows in row_blocks(shape))
        positive = check_part(parts, "positive", (torch.uint8,), (-(-num_bits // 8),))
        if num_bits % 8 and int(positive[-1]) >> num_bits % 8:
            raise ValueError(f"positive has bits set beyond the {num_bits} of bitmap")
        check_scales(parts, shape)

    def add_to(self, weight: Tensor, parts: Parts) -> None:
        row_scale, column_scale = parts["row_scale"], parts.get("column_scale")
        for rows, nonzero, positive in _signs_by_block(parts, (weight.shape[0], weight.shape[1])):
            term = torch.from_numpy(positive.view(np.int8) * 2 - nonzero).float()  # -1, 0 and +1
            if column_scale is not None:
                term *= column_scale
            weight[rows] += term.mul_(row_scale[rows, None])

    def terms(self, parts: Parts, shape: tuple[int, int]) -> LinearTerms:
        """Two planes of half the scale: both +1, both -1, or +1 and -1 where S is 0."""
        above, below = [], []
        for _, nonzero, positive in _signs_by_block(parts, shape):
            above.append(pack_bits(positive | ~nonzero))
            below.append(pack_bits(positive))
        row_scale, column_scale = parts["row_scale"] / 2, parts.get("column_scale")
        planes = (SignPlane(torch.cat(bits), row_scale, column_scale) for bits in (above, below))
        return LinearTerms(signs=tuple(planes))


TERNARY = Ternary()


def encode_ternary(difference: Tensor) -> Term:
    """S = sign(D), and the u and v that minimise ‖D - u ∘ (S ∘ v)‖. difference [N, K] float32"""
    row_scale, column_scale = fit_scales(difference, only_nonzero=True)
    bitmap, positive = [], []
    for rows in row_blocks(difference.shape):
        block = difference[rows].numpy()
        nonzero = block != 0
        bitmap.append(pack_bits(nonzero))
        positive.append((block > 0).reshape(-1)[np.flatnonzero(nonzero)])
    parts = {
        "bitmap": torch.cat(bitmap),
        "positive": pack_bits(np.concatenate(positive)),
        "row_scale": row_scale,
        "column_scale": column_scale,
    }
    return Term(TERNARY.name, parts)


def _signs_by_block(parts: Parts, shape: tuple[int, int]) -> Iterator[tuple[slice, BoolArray, BoolArray]]:
    """Rows and, for each number of them, whether it is not 0 and whether it is positive: [n, K]."""
    positive_of_nonzero = unpack_bits(parts["positive"], 8 * len(parts["positive"]))
    first = 0
    for rows in row_blocks(shape):
        nonzero = unpack_bits(parts["bitmap"][rows], shape[1])
        places = np.flatnonzero(nonzero)
        positive = np.zeros_like(nonzero)
        positive.reshape(-1)[places] = positive_of_nonzero[first : first + len(places)]
        first += len(places)
        yield rows, nonzero, positive

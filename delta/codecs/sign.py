"""`sign`: one bit for each number and a scale for each row and column.

Source: BitDelta, arXiv 2402.10193 (one scale for the matrix); Per-Axis Weight Deltas, arXiv 2512.19720.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from delta.codecs.codec import Parts, Term
from delta.codecs.packed_bits import check_bits, pack_bits, row_blocks, unpack_bits
from delta.codecs.part_checks import check_finite, check_names, check_part
from delta.variant_terms import LinearTerms, SignPlane

_NUM_FITS = 2


class Sign:
    """D = u ∘ (S ∘ v), S of -1 and +1. A `DifferenceCodec`.

    Parts: bits [N, ceil(K / 8)] uint8 and row_scale u [N] float32 as in `SignPlane`; column_scale v [K] float32, which
    may be missing: all 1.
    """

    name = "sign"

    def check(self, parts: Parts, shape: tuple[int, int]) -> None:
        check_names(parts, "bits", *scale_names(parts))
        check_bits(parts, "bits", shape)
        check_scales(parts, shape)

    def add_to(self, weight: Tensor, parts: Parts) -> None:
        bits, row_scale, column_scale = parts["bits"], parts["row_scale"], parts.get("column_scale")
        for rows in row_blocks(weight.shape):
            term = _signs(bits[rows], weight.shape[1])
            if column_scale is not None:
                term *= column_scale
            weight[rows] += term.mul_(row_scale[rows, None])

    def terms(self, parts: Parts, shape: tuple[int, int]) -> LinearTerms:
        return LinearTerms(signs=(SignPlane(parts["bits"], parts["row_scale"], parts.get("column_scale")),))


SIGN = Sign()


def encode_sign(difference: Tensor) -> Term:
    """S = sign(D), where 0 counts as +1, and the u and v that minimise ‖D - u ∘ (S ∘ v)‖ = ‖|D| - u vᵀ‖.

    difference [N, K] float32
    """
    bits = _pack_signs(difference)
    row_scale, column_scale = fit_scales(difference)
    return Term(SIGN.name, {"bits": bits, "row_scale": row_scale, "column_scale": column_scale})


def encode_sign_with_one_scale(difference: Tensor) -> Term:
    """BitDelta as published: the same signs, all scaled by the mean of |D|; what ours is measured against."""
    row_scale = difference.abs().mean().expand(len(difference)).contiguous()
    return Term(SIGN.name, {"bits": _pack_signs(difference), "row_scale": row_scale})


def fit_scales(difference: Tensor, *, only_nonzero: bool = False) -> tuple[Tensor, Tensor]:
    """The u [N] and v [K] that minimise Σ (|D| - u vᵀ)² over all numbers, or over those of D that are not 0.

    By alternating least squares from v = 1: each pass over D makes u best for v, then v best for u. Two are enough: the
    largest singular value of a matrix without negative numbers stands far above the others; with zeros, that count
    for nothing, it takes three. The mean of v is 1.
    """
    num_rows, num_columns = difference.shape
    u, v = torch.zeros(num_rows), torch.ones(num_columns)
    for _ in range(_NUM_FITS + only_nonzero):
        above, below = torch.zeros(num_columns), torch.zeros(num_columns)
        for rows in row_blocks(difference.shape):
            magnitudes = difference[rows].abs()
            weights = magnitudes.sign() if only_nonzero else None  # 0 and 1
            u[rows] = _quotient(magnitudes @ v, v.square().sum() if weights is None else weights @ v.square())
            above += u[rows] @ magnitudes
            below += u[rows].square().sum() if weights is None else u[rows].square() @ weights
        v = _quotient(above, below)
    mean = v.mean()
    return (u * mean, v / mean) if mean > 0 else (u, torch.ones(num_columns))


def scale_names(parts: Parts) -> tuple[str, ...]:
    """The names that the scales among the parts should have."""
    return ("row_scale", "column_scale") if "column_scale" in parts else ("row_scale",)


def check_scales(parts: Parts, shape: tuple[int, int]) -> None:
    """Raises ValueError: scales of another dtype or shape, or not finite."""
    for name, length in zip(scale_names(parts), shape, strict=False):
        check_part(parts, name, (torch.float32,), (length,))
        check_finite(parts, name)


def _pack_signs(difference: Tensor) -> Tensor:
    return torch.cat([pack_bits(difference[rows].numpy() >= 0) for rows in row_blocks(difference.shape)])


def _quotient(above: Tensor, below: Tensor) -> Tensor:
    """0 where the divisor is 0."""
    return torch.where(below > 0, above / below, 0.0)


def _signs(bits: Tensor, num_columns: int) -> Tensor:
    """-1 and +1. [n, ceil(num_columns / 8)] uint8 -> [n, num_columns] float32"""
    bits_of_byte = unpack_bits(torch.arange(256, dtype=torch.uint8)[:, None], 8)  # [256, 8]
    of_byte = torch.from_numpy(bits_of_byte).float() * 2 - 1
    return functional.embedding(bits.int(), of_byte).flatten(1)[:, :num_columns]

"""Which terms a matrix gets.

    p = 0            nothing                     p: share of the numbers that changed
    p ≤ 2%           sparse                      e: share of ‖D‖² in its 64 largest components
    e ≥ 95%          lowrank, if that is at most 4 bits a weight
    p ≤ 60%          ternary, and residuals
    else             sign, and residuals

What would be no smaller than the matrix itself, or holds numbers that are not finite, is stored exactly instead. Source
of the rules: VARIANTS in the design documents, section 3.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from delta.codecs.codec import Term
from delta.codecs.dense import encode_dense
from delta.codecs.lossless import LOSSLESS
from delta.codecs.lowrank import encode_low_rank, input_root, low_rank_term
from delta.codecs.packed_bits import row_blocks
from delta.codecs.policy import CodecPolicy
from delta.codecs.registry import DIFFERENCE_CODECS
from delta.codecs.replace import REPLACE
from delta.codecs.sign import encode_sign
from delta.codecs.singular_components import SingularComponents, singular_components
from delta.codecs.sparse import encode_sparse
from delta.codecs.ternary import encode_ternary
from delta.scratch import Scratch

_MAX_SPARSE = 0.02
_MAX_TERNARY = 0.6
_LOW_RANK = 64
_LOW_RANK_ENERGY = 0.95
_NEGLIGIBLE_ENERGY = 0.001
"""Components are left out as long as all of them together have less than this share of those that were found."""
_NUM_SAMPLED_ROWS = 128
_SAMPLED_ENERGY = 0.9
_MAX_LOW_RANK_BITS = 4
_SEED = 0x5EED


@dataclass(frozen=True, slots=True, eq=False)
class EncodedMatrix:
    """Attributes:
    terms: of differences in the order in which they are added, or one of a whole codec. None at all: W' is W, but for
        the dtype and the sign of zeros.
    size_of_change: ‖D‖; None: not known, because the terms are exact.
    """

    terms: tuple[Term, ...]
    size_of_change: float | None


def encode_matrix(
    base: Tensor,
    target: Tensor,
    policy: CodecPolicy,
    *,
    inputs: Sequence[Tensor] = (),
    scratch: Scratch | None = None,
) -> EncodedMatrix:
    """The terms of W' [N, K] given W [N, K], which differ in some bit, both in the dtypes of their checkpoints.

    Args:
        inputs: pieces [n, K] of what the matrix is multiplied with: low-rank terms are made for these. None: for any.
        scratch: for D, which is not needed any more when this returns; None: memory of its own.
    """
    if policy.codec == "lossless":
        return EncodedMatrix((Term(LOSSLESS.name, LOSSLESS.encode(base, target)),), None)
    if policy.codec in ("dense", "sparse") or not (base.is_floating_point() and target.is_floating_point()):
        return EncodedMatrix((_exact(base, target, encode_sparse if policy.codec == "sparse" else encode_dense),), None)
    difference = (Scratch() if scratch is None else scratch).empty(base.shape, torch.float32)
    size = _subtract(base, target, difference)
    if not math.isfinite(size):
        return EncodedMatrix((_exact(base, target, encode_dense),), None)
    if policy.codec == "auto":
        terms = _chosen(base, target, difference, policy, inputs)
    elif policy.codec == "lowrank":
        terms = (encode_low_rank(difference, policy.rank, input_root(inputs) if inputs else None),)
    else:
        terms = _with_residuals(difference, encode_sign if policy.codec == "sign" else encode_ternary, policy, inputs)
    if sum(part.nbytes for term in terms for part in term.parts.values()) < target.nbytes:
        return EncodedMatrix(terms, size)
    return EncodedMatrix((_exact(base, target, encode_dense),), None)


def _chosen(
    base: Tensor, target: Tensor, difference: Tensor, policy: CodecPolicy, inputs: Sequence[Tensor]
) -> tuple[Term, ...]:
    changed = changed_share(difference)
    if changed == 0:
        return ()
    if changed <= _MAX_SPARSE and (sparse := encode_sparse(base, target)) is not None:
        return (sparse,)
    if (components := low_rank_components(difference)) is not None:
        term = low_rank_term(components.a, components.b)
        if 8 * sum(part.nbytes for part in term.parts.values()) <= _MAX_LOW_RANK_BITS * difference.numel():
            return (term,)
    return _with_residuals(difference, encode_ternary if changed <= _MAX_TERNARY else encode_sign, policy, inputs)


def changed_share(difference: Tensor) -> float:
    """p: the share of the numbers that are not 0."""
    counts = (np.count_nonzero(difference[rows].numpy() != 0) for rows in row_blocks(difference.shape))
    return sum(counts) / difference.numel()


def low_rank_components(difference: Tensor) -> SingularComponents | None:
    """The 64 largest components but for negligible ones, if they have 95% of the energy; else None.

    What cannot have is told by a sample of the rows, in a small part of the time.
    """
    energy = float(torch.linalg.vector_norm(difference, dtype=torch.float64)) ** 2
    if _sampled_energy(difference) < _SAMPLED_ENERGY:
        return None
    found = singular_components(difference, _LOW_RANK)
    total = float(found.energies.double().sum())
    if total < _LOW_RANK_ENERGY * energy:
        return None
    left = total - found.energies.double().cumsum(0)
    rank = int((left > _NEGLIGIBLE_ENERGY * total).sum()) + 1
    return SingularComponents(found.a[:rank], found.b[:, :rank], found.energies[:rank])


def _sampled_energy(difference: Tensor) -> float:
    """The share of the 64 largest components in rows drawn by their energies; of few rows, more than that of all."""
    energies = torch.linalg.vector_norm(difference, dim=1).square()
    num_rows = min(_NUM_SAMPLED_ROWS, int(energies.count_nonzero()))
    if num_rows == 0:  # their squares are too small for float32
        return 0.0
    rows = torch.multinomial(energies, num_rows, generator=torch.Generator().manual_seed(_SEED))
    sample = difference[rows] / energies[rows].sqrt()[:, None]
    found = torch.linalg.eigvalsh(sample @ sample.T)
    return float(found[-_LOW_RANK:].sum()) / num_rows


def _with_residuals(
    difference: Tensor, first: Callable[[Tensor], Term], policy: CodecPolicy, inputs: Sequence[Tensor]
) -> tuple[Term, ...]:
    """Each term is of what those before it left, but signs before a low-rank term leave its components alone.

    What training changed lies in few components, and rounding to 16 bits in all: signs of the whole difference would
    blur those components, and no later term of the same rank could mend it. So the components are taken out before the
    signs are fitted, and fitted again at their place. (A ternary term keeps its zeros, and needs none of that.)
    """
    root = input_root(inputs) if inputs and "lowrank" in policy.residuals else None

    def encode_product(left: Tensor) -> Term:
        return encode_low_rank(left, policy.rank, root)

    terms: list[Term] = []
    encoders = [first, *(encode_sign if residual == "sign" else encode_product for residual in policy.residuals)]
    for index, encode in enumerate(encoders):
        left = _left_by(difference, terms)
        if first is encode_sign and encode is encode_sign and "lowrank" in policy.residuals[index:]:
            left = _left_by(left, [encode_product(left)])
        terms.append(encode(left))
    return tuple(terms)


def _left_by(difference: Tensor, terms: Sequence[Term]) -> Tensor:
    """D less the terms."""
    if not terms:
        return difference
    left = -difference  # codecs can only add
    for term in terms:
        DIFFERENCE_CODECS[term.codec].add_to(left, term.parts)
    return left.neg_()


def _exact(base: Tensor, target: Tensor, encode: Callable[[Tensor, Tensor], Term | None]) -> Term:
    term = encode(base, target)
    return Term(REPLACE.name, REPLACE.encode(base, target)) if term is None else term


def _subtract(base: Tensor, target: Tensor, difference: Tensor) -> float:
    """Make `difference` D = fp32(W') - fp32(W). -> ‖D‖, which is not finite where W' or W is not."""
    squares = 0.0
    for rows in row_blocks(base.shape):
        block = difference[rows].copy_(target[rows]).sub_(base[rows]).view(-1)
        squares += float(block @ block)
    return math.sqrt(squares)

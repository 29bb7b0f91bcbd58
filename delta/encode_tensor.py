"""One tensor of a fine-tune as terms, and what they give back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from compression.safetensors_writer import SAFETENSORS_DTYPES
from delta.codecs.choice import EncodedMatrix, encode_matrix
from delta.codecs.codec import Term
from delta.codecs.lossless import LOSSLESS
from delta.codecs.packed_bits import row_blocks
from delta.codecs.policy import CodecPolicy
from delta.codecs.registry import WHOLE_CODECS
from delta.codecs.replace import REPLACE
from delta.delta_config import ROWS, DeltaTensor, StoredPart, StoredTerm
from delta.reconstruct import reconstruct
from delta.same_bits import same_bits
from delta.scratch import Scratch
from delta.tensor_digest import tensor_digest


def encode_tensor(
    before: Tensor | None,
    after: Tensor,
    policy: CodecPolicy,
    *,
    base_name: str | None,
    target_digest: str,
    inputs: Sequence[Tensor] = (),
    scratch: Scratch | None = None,
) -> tuple[tuple[Term, ...], DeltaTensor]:
    """The terms of a tensor that differs from the base's, and their description.

    Matrices are coded as `policy` says, and given back in the dtype of the fine-tune where that is exact, else in
    float32. Stored whole are tensors without a counterpart, of one dimension, of integers,
    or with numbers that are not finite.

    Args:
        before: the base's; None: it has none. Two dimensions may have another number of rows.
        base_name: the name of `before`.
        target_digest: of `after`, in hex.
        inputs: as of `encode_matrix`.
        scratch: for a float32 of each number; None: memory of its own.
    """
    terms, result, error = _encode(before, after, policy, inputs, Scratch() if scratch is None else scratch)
    digest = target_digest if result is after else tensor_digest(result)
    return terms, describe_tensor(terms, result, base_name=base_name, digest=digest, error=error)


def describe_tensor(
    terms: tuple[Term, ...], result: Tensor, *, base_name: str | None, digest: str, error: float
) -> DeltaTensor:
    """The description of terms that give back `result`, which has this digest."""
    return DeltaTensor(
        dtype=SAFETENSORS_DTYPES[result.dtype],
        shape=tuple(result.shape),
        base=base_name,
        terms=tuple(StoredTerm(term.codec, {name: _part(part) for name, part in term.parts.items()}) for term in terms),
        digest=digest,
        error=error,
    )


def _encode(
    before: Tensor | None, after: Tensor, policy: CodecPolicy, inputs: Sequence[Tensor], scratch: Scratch
) -> tuple[tuple[Term, ...], Tensor, float]:
    """The terms of a tensor, what they give back, and the relative error of that; `after` itself where it is exact."""
    encoded = None if before is None else _encode_matrix(before, after, policy, inputs, scratch)
    if before is None or encoded is None:
        return _whole(before, after, policy), after, 0.0
    if any(term.codec in WHOLE_CODECS for term in encoded.terms):
        return encoded.terms, after, 0.0
    sums = reconstruct(before, encoded.terms, torch.float32, tuple(after.shape), scratch)
    if _rounds_to(sums, after):
        return encoded.terms, after, 0.0
    missed = _missed(after, sums)
    if not math.isfinite(missed):
        return _whole(before, after, policy), after, 0.0
    # Not rounded: that would blur what is near the fine-tune, and it is not done where it is served unapplied.
    return encoded.terms, sums, missed / encoded.size_of_change if encoded.size_of_change else 0.0


def _encode_matrix(
    before: Tensor, after: Tensor, policy: CodecPolicy, inputs: Sequence[Tensor], scratch: Scratch
) -> EncodedMatrix | None:
    """The terms of what both have and of further rows; None: no codec of matrices can do anything with them."""
    if after.ndim < 2 or not (before.is_floating_point() and after.is_floating_point()):
        return None
    num_rows = min(len(before), len(after))
    of_base, kept = before[:num_rows], after[:num_rows]
    if not kept.numel():
        return None
    encoded = EncodedMatrix((), None)
    if not same_bits(of_base, kept):
        matrix = kept.reshape(-1, kept.shape[-1])
        encoded = encode_matrix(of_base.reshape(matrix.shape), matrix, policy, inputs=inputs, scratch=scratch)
    if any(term.codec == REPLACE.name for term in encoded.terms):
        return None
    if num_rows == len(after):
        return encoded
    return replace(encoded, terms=(*encoded.terms, Term(ROWS, {ROWS: after[num_rows:]})))


def _whole(before: Tensor | None, after: Tensor, policy: CodecPolicy) -> tuple[Term, ...]:
    if policy.codec == "lossless" and after.ndim >= 2 and (before is None or before.shape == after.shape):
        return (Term(LOSSLESS.name, LOSSLESS.encode(before, after)),)
    return (Term(REPLACE.name, REPLACE.encode(before, after)),)


def _rounds_to(sums: Tensor, target: Tensor) -> bool:
    """Whether the sums, rounded to the dtype of `target`, are its bits; block by block, since most are not."""
    sums, target = (tensor.view(-1, tensor.shape[-1]) for tensor in (sums, target))
    return all(same_bits(sums[rows].to(target.dtype), target[rows]) for rows in row_blocks(sums.shape))


def _missed(target: Tensor, sums: Tensor) -> float:
    """|W' - sums|; not finite: sums that are not, or are not in the dtype of W', as beyond float16."""
    sums, target = (tensor.view(-1, tensor.shape[-1]) for tensor in (sums, target))
    missed = []
    for rows in row_blocks(sums.shape):
        if target.dtype == torch.float16 and not sums[rows].to(target.dtype).isfinite().all():
            return math.inf
        missed.append(torch.linalg.vector_norm(target[rows].float() - sums[rows]).item())
    return math.hypot(*missed)


def _part(part: Tensor) -> StoredPart:
    return StoredPart(SAFETENSORS_DTYPES[part.dtype], tuple(part.shape), tensor_digest(part))

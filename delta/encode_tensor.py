"""One tensor of a fine-tune as terms, and what they give back."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from compression.safetensors_writer import SAFETENSORS_DTYPES
from delta.codecs.choice import encode_matrix
from delta.codecs.codec import Term
from delta.codecs.lossless import LOSSLESS
from delta.codecs.packed_bits import row_blocks
from delta.codecs.policy import CodecPolicy
from delta.codecs.registry import WHOLE_CODECS
from delta.codecs.replace import REPLACE
from delta.delta_config import ROWS, DeltaTensor, StoredPart, StoredTerm
from delta.reconstruct import reconstruct
from delta.same_bits import same_bits
from delta.tensor_digest import tensor_digest


def encode_tensor(
    before: Tensor | None, after: Tensor, policy: CodecPolicy, *, base_name: str | None, target_digest: str
) -> tuple[tuple[Term, ...], DeltaTensor]:
    """The terms of a tensor that differs from the base's, and their description.

    Matrices are coded as `policy` says, and given back in the dtype of the fine-tune where that is exact, else in
    float32. Stored whole are tensors without a counterpart, of one dimension, of integers,
    or with numbers that are not finite.

    Args:
        before: the base's; None: it has none. Two dimensions may have another number of rows.
        base_name: the name of `before`.
        target_digest: of `after`, in hex.
    """
    terms, result = _encode(before, after, policy)
    is_exact = same_bits(result, after)
    digest = target_digest if is_exact else tensor_digest(result)
    error = 0.0 if is_exact or before is None else _relative_error(before, after, result)
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


def _encode(before: Tensor | None, after: Tensor, policy: CodecPolicy) -> tuple[tuple[Term, ...], Tensor]:
    """The terms of a tensor, and what they give back."""
    terms: tuple[Term, ...] = ()
    num_rows = len(after) if before is None or after.ndim < 2 else min(len(before), len(after))
    kept = after[:num_rows] if after.ndim else after
    if before is None or after.ndim < 2 or not _is_coded(before[:num_rows], kept):
        terms = _whole(before, after, policy)
        return terms, after
    of_base = before[:num_rows]
    if not same_bits(of_base, kept):
        matrix = kept.reshape(-1, kept.shape[-1])
        terms = encode_matrix(of_base.reshape(matrix.shape), matrix, policy)
    if num_rows < len(after):
        terms += (Term(ROWS, {ROWS: after[num_rows:]}),)
    are_whole = bool(terms) and terms[0].codec in WHOLE_CODECS
    sums = reconstruct(before, terms, after.dtype if are_whole else torch.float32, tuple(after.shape))
    result = sums.to(after.dtype)
    if not _all_finite(result):  # a sum beyond float16
        terms = _whole(before, after, policy)
        return terms, after
    # Rounding what is near the fine-tune anyway would blur it, and it is not rounded where it is served unapplied.
    return terms, result if same_bits(result, after) else sums


def _is_coded(before: Tensor, after: Tensor) -> bool:
    """Numbers of which there are differences."""
    if not before.numel() or not (before.is_floating_point() and after.is_floating_point()):
        return False
    return _all_finite(before) and _all_finite(after)


def _whole(before: Tensor | None, after: Tensor, policy: CodecPolicy) -> tuple[Term, ...]:
    if policy.codec == "lossless" and after.ndim >= 2 and (before is None or before.shape == after.shape):
        return (Term(LOSSLESS.name, LOSSLESS.encode(before, after)),)
    return (Term(REPLACE.name, REPLACE.encode(before, after)),)


def _all_finite(tensor: Tensor) -> bool:
    low, high = torch.aminmax(tensor)
    return bool(torch.isfinite(low) and torch.isfinite(high))


def _part(part: Tensor) -> StoredPart:
    return StoredPart(SAFETENSORS_DTYPES[part.dtype], tuple(part.shape), tensor_digest(part))


def _relative_error(before: Tensor, after: Tensor, result: Tensor) -> float:
    """|W' - given back| / |W' - W| over the rows that both have."""
    num_rows = min(len(before), len(after))
    shape = (num_rows, after[0].numel())
    before, after, result = (tensor[:num_rows].reshape(shape) for tensor in (before, after, result))
    missed, changed = [], []
    for rows in row_blocks(shape):
        wanted = after[rows].float()
        missed.append(torch.linalg.vector_norm(wanted - result[rows].float()).item())
        changed.append(torch.linalg.vector_norm(wanted - before[rows].float()).item())
    return math.hypot(*missed) / math.hypot(*changed) if any(changed) else 0.0

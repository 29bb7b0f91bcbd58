"""The tensor that a delta stands for, from the base's tensor and the stored terms."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from delta.codecs.codec import Term
from delta.codecs.registry import DIFFERENCE_CODECS, WHOLE_CODECS
from delta.delta_config import ROWS
from delta.scratch import Scratch


def reconstruct(
    base: Tensor | None,
    terms: Sequence[Term],
    dtype: torch.dtype,
    shape: tuple[int, ...],
    scratch: Scratch | None = None,
) -> Tensor:
    """W' = cast(fp32(W) + D1 + D2 + …), or the tensor of a whole codec; then the rows that the base does not have.

    Rows of the base beyond those of `shape` are left out. The result is in memory of its own, or that of a part.

    Args:
        scratch: for the sum, which in float32 without further rows is also the result; None: memory of its own.

    Raises:
        ValueError: compressed data is damaged.
    """
    if not terms or terms[-1].codec != ROWS:
        return _without_rows(base, terms, dtype, shape, scratch)
    rows = terms[-1].parts[ROWS]
    kept = shape[0] - len(rows)
    result = torch.empty(shape, dtype=dtype)
    result[:kept] = _without_rows(base, terms[:-1], dtype, (kept, *shape[1:]), scratch)
    result[kept:] = rows
    return result


def add_difference(weight: Tensor, base: Tensor, terms: Sequence[Term], dtype: torch.dtype) -> None:
    """weight += W' - W, in place; weight [N, ...] float32, base of the same shape. One delta of several that add up.

    Raises:
        ValueError: compressed data is damaged.
    """
    if any(term.codec in WHOLE_CODECS for term in terms):
        weight += _without_rows(base, terms, dtype, tuple(base.shape)).float() - base.float()
    else:
        _add(weight, terms)


def _without_rows(
    base: Tensor | None,
    terms: Sequence[Term],
    dtype: torch.dtype,
    shape: tuple[int, ...],
    scratch: Scratch | None = None,
) -> Tensor:
    of_base = base if base is None or not shape else base[: shape[0]]
    if terms and terms[0].codec in WHOLE_CODECS:
        if of_base is not None and of_base.shape != shape:
            of_base = None
        return WHOLE_CODECS[terms[0].codec].decode(of_base, terms[0].parts, dtype, shape)
    if of_base is None or of_base.shape != shape:
        raise ValueError(f"the terms belong to a tensor of shape {list(shape)}, which the base does not have")
    if not terms:
        return of_base.to(dtype)
    empty = torch.empty if scratch is None else scratch.empty
    weight = empty(shape, dtype=torch.float32).copy_(of_base)
    _add(weight, terms)
    return weight.to(dtype)


def _add(weight: Tensor, terms: Sequence[Term]) -> None:
    matrix = weight.view(-1, weight.shape[-1])
    for term in terms:
        DIFFERENCE_CODECS[term.codec].add_to(matrix, term.parts)

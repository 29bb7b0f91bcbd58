"""`dense`: the difference itself, as FastChat's deltas have it."""

from __future__ import annotations

import torch
from torch import Tensor

from delta.codecs.codec import Parts, Term
from delta.codecs.part_checks import check_finite, check_names, check_part
from delta.same_bits import same_bits
from delta.variant_terms import LinearTerms

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Dense:
    """D = difference. A `DifferenceCodec`.

    Parts: difference [N, K], float32, bfloat16 or float16.
    """

    name = "dense"

    def check(self, parts: Parts, shape: tuple[int, int]) -> None:
        check_names(parts, "difference")
        check_part(parts, "difference", _DTYPES, shape)
        check_finite(parts, "difference")

    def add_to(self, weight: Tensor, parts: Parts) -> None:
        weight += parts["difference"]  # float32 + a narrower type is computed in float32

    def terms(self, parts: Parts, shape: tuple[int, int]) -> LinearTerms:
        return LinearTerms(dense=parts["difference"])


DENSE = Dense()


def encode_dense(base: Tensor, target: Tensor) -> Term | None:
    """D in the fine-tune's dtype where that is exact, else in float32; None: no difference gives all its bits back."""
    if not (base.is_floating_point() and target.is_floating_point()) or target.dtype not in _DTYPES:
        return None
    difference = target.float() - base.float()
    for dtype in dict.fromkeys((target.dtype, torch.float32)):
        stored = difference.to(dtype)
        exact = same_bits((base.float() + stored.float()).to(target.dtype), target)
        if exact and bool(torch.stack(torch.aminmax(stored.float())).isfinite().all()):
            return Term("dense", {"difference": stored})
    return None

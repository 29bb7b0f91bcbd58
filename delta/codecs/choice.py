"""Which terms a matrix gets."""

from __future__ import annotations

from torch import Tensor

from delta.codecs.codec import Term
from delta.codecs.dense import encode_dense
from delta.codecs.policy import CodecPolicy
from delta.codecs.replace import REPLACE
from registry.errors import InvalidRequestError


def encode_matrix(base: Tensor, target: Tensor, policy: CodecPolicy) -> tuple[Term, ...]:
    """The terms of W' [N, K] given W [N, K], which differ in some bit, both in the dtypes of their checkpoints.

    Terms of differences are added in the order given; a term of a whole codec is the only one.

    Raises:
        InvalidRequestError: a codec that is not here yet.
    """
    if policy.codec != "dense":
        raise InvalidRequestError(f"the codec {policy.codec} is not here yet; use dense")
    dense = encode_dense(base, target)
    return (Term(REPLACE.name, REPLACE.encode(base, target)) if dense is None else dense,)

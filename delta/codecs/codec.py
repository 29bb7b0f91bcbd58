"""What a codec is: pure functions between a matrix and a few named tensors.

W is the base's matrix [N, K], W' the fine-tune's, both in the dtypes of their checkpoints. There are two kinds:

    difference   W' = cast(fp32(W) + D1 + D2 + …)    dense, sign, ternary, lowrank, sparse: several may follow
    whole        W' by itself                        replace, lossless: exact, and the only term of their tensor
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from delta.variant_terms import LinearTerms

Parts: TypeAlias = Mapping[str, Tensor]
"""What is stored of one term, by the name of the part ("bits", "row_scale", …): contiguous, on the CPU."""


@dataclass(frozen=True, slots=True, eq=False)
class Term:
    """One stored term of a tensor.

    Attributes:
        codec: a name of `delta.codecs.registry`.
    """

    codec: str
    parts: Parts


class DifferenceCodec(Protocol):
    """D [N, K] float32. How it is encoded is the codec's own function: each has other choices to make."""

    @property
    def name(self) -> str: ...

    def check(self, parts: Parts, shape: tuple[int, int]) -> None:
        """Everything that a damaged or hostile file could have wrong, so that no other method fails on it.

        Raises:
            ValueError: a part is missing, unknown, of another dtype or shape, not finite, an index is out of range or
                not ascending, a bit is set beyond K. The message names the part.
        """
        ...

    def add_to(self, weight: Tensor, parts: Parts) -> None:
        """weight += D, in place, block by block where D would be large; weight [N, K] float32.

        The result has the same bits on every machine: element by element in float32, or, where there is a sum of
        products, in float64 of 16-bit factors, which is exact, and then rounded to float32.
        """
        ...

    def terms(self, parts: Parts, shape: tuple[int, int]) -> LinearTerms:
        """The same D for serving it unapplied; may share memory with `parts`."""
        ...


class WholeCodec(Protocol):
    """W' [N, K] (or of any shape) itself."""

    @property
    def name(self) -> str: ...

    def encode(self, base: Tensor | None, target: Tensor) -> Parts:
        """`base` has the shape of `target`, and its dtype or another; None: the base has no such tensor."""
        ...

    def check(self, parts: Parts, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        """As `DifferenceCodec.check`; a number that is not finite is allowed."""
        ...

    def decode(self, base: Tensor | None, parts: Parts, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        """W' with its bits, in memory of its own or shared with `parts`; raises ValueError on damaged data."""
        ...

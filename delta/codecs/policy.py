"""Which terms a matrix may get."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

CodecChoice: TypeAlias = Literal["auto", "lossless", "sign", "ternary", "lowrank", "sparse", "dense"]
Residual: TypeAlias = Literal["sign", "lowrank"]
EXACT_CODECS: frozenset[CodecChoice] = frozenset({"lossless", "sparse", "dense"})

_LADDER: tuple[tuple[tuple[Residual, ...], int], ...] = (
    ((), 0),
    (("lowrank",), 16),
    (("sign", "lowrank"), 16),
    (("sign", "sign", "lowrank"), 32),
    (("sign", "sign", "sign", "lowrank"), 64),
)
"""Residuals and rank: one to four bits a weight, all but the first with a low-rank term.

Low rank comes first: of the change of a fine-tune in bfloat16, most is rounding, and what was trained has a low rank.
"""


@dataclass(frozen=True, slots=True)
class CodecPolicy:
    """What was asked for on the command line.

    Attributes:
        codec: the codec of all matrices, or "auto": chosen for each by what it changed. One that was named is taken
            for every matrix that changed (sparse and dense are exact; where no difference is, the matrix is replaced).
        residuals: what follows a sign or ternary term, each of what those before it left.
        rank: of a low-rank term or residual; at most min(N, K) of the matrix is used.
    """

    codec: CodecChoice = "auto"
    residuals: tuple[Residual, ...] = ()
    rank: int = 16

    def of_tables(self) -> CodecPolicy:
        """For input embeddings: "auto" gives them no low-rank residual.

        Of the small model, signs of the embedding change predictions a hundredth as much as those of the linear layers.
        """
        kept = tuple(residual for residual in self.residuals if residual != "lowrank")
        return replace(self, residuals=kept) if self.codec == "auto" else self

    def finer(self) -> CodecPolicy | None:
        """The next of the ladder, for a delta that is not close enough to its fine-tune; None: it is exact already."""
        if self.codec in EXACT_CODECS:
            return None
        if self.codec == "lowrank":
            return CodecPolicy("dense")
        reached = [
            index
            for index, (residuals, rank) in enumerate(_LADDER)
            if residuals == self.residuals and rank <= self.rank
        ]
        if not reached or reached[-1] + 1 == len(_LADDER):
            return CodecPolicy("dense")
        residuals, rank = _LADDER[reached[-1] + 1]
        return replace(self, residuals=residuals, rank=max(rank, self.rank))

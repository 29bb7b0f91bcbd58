"""Which terms a matrix may get."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

CodecChoice: TypeAlias = Literal["auto", "lossless", "sign", "ternary", "lowrank", "sparse", "dense"]
Residual: TypeAlias = Literal["none", "sign", "lowrank"]


@dataclass(frozen=True, slots=True)
class CodecPolicy:
    """What was asked for on the command line.

    Attributes:
        codec: the codec of all matrices, or "auto": chosen for each by what it changed. One that was named is taken
            for every matrix that changed (sparse and dense are exact; where no difference is, the matrix is replaced).
        residual: what follows a sign or ternary term, of what it left.
        rank: of a low-rank term or residual; at most min(N, K) of the matrix is used.
    """

    codec: CodecChoice = "auto"
    residual: Residual = "none"
    rank: int = 16

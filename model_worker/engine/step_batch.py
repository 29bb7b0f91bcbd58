"""One step as numbers: all that whatever computes a model has to know of it, and nothing else.

    SchedulerOutput ──BatchBuilder──► StepBatch ──► StepRunner of rank 0, and of the others

A StepBatch is made of arrays in host memory and tuples of numbers, without sequences or tensors, so that it can be
pickled and sent to other processes. Variants are named by their numbers; whoever computes knows what is bound for each.

    token      0 ................................................. T    input_ids, positions, slot_mapping
    sequence   0            | 1     | 2 ...................... | S      query_start, seq_lens, block_tables
    segment    base                 | variant 4                |        segments
    logits            ^           ^                          ^          logit_rows, of which each sample uses one
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

BlockPairs = tuple[tuple[int, int], ...]
"""(source, destination)."""


class RowSegment(NamedTuple):
    """Rows [start, end) use the variant of this number; rows in no segment are the base's."""

    start: int
    end: int
    variant: int


class PendingToken(NamedTuple):
    """The token at `place` of the batch is what `sample` of the step before drew: only the device knows its id yet."""

    place: int
    sample: int


class PromptRows(NamedTuple):
    """Consecutive tokens [start, end) of the batch whose logits are wanted for the logprobs of a prompt.

    Attributes:
        variant: number of the variant that they use; None: the base.
    """

    start: int
    end: int
    variant: int | None


@dataclass(frozen=True, slots=True)
class BlockMoves:
    """What is done with blocks of the KV cache before anything is computed, in the order of the fields.

    Attributes:
        swap_out: from a block to a block of the host pool.
        swap_in: from a block of the host pool to a block.
        copies: of which all sources are read before a destination is written.
        cleared: blocks that get their first tokens and are not filled.
    """

    swap_out: BlockPairs = ()
    swap_in: BlockPairs = ()
    copies: BlockPairs = ()
    cleared: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class StepBatch:
    """T tokens of S sequences, in G layer groups.

    Attributes:
        input_ids: [T] int64; 0 where the token is pending.
        positions: [T] int64, of each token in its sequence.
        slot_mapping: [G, T] int64, the KV cache slot of each token: block * block_size + offset.
        block_tables: [G, S, most blocks of a sequence] int32, filled up with block 0.
        query_start: S + 1 numbers; sequence s has the tokens [query_start[s], query_start[s + 1]).
        seq_lens: S numbers; positions of the sequence up to and with those of its tokens here.
        blocks: to be copied and cleared first.
        pending: input ids that are taken from the last step's draws.
        segments: the tokens' variants.
        logit_rows: [R] int64, ascending; the tokens whose logits are sampled from.
        logit_segments: the variants of these R rows.
        repeats: [samples] int64, for each sample its place in `logit_rows`; None: each row is sampled once.
        prompt_rows: their logits are computed before those of `logit_rows`, one piece after the other.
    """

    input_ids: npt.NDArray[np.int64]
    positions: npt.NDArray[np.int64]
    slot_mapping: npt.NDArray[np.int64]
    block_tables: npt.NDArray[np.int32]
    query_start: tuple[int, ...]
    seq_lens: tuple[int, ...]
    blocks: BlockMoves
    pending: tuple[PendingToken, ...]
    segments: tuple[RowSegment, ...]
    logit_rows: npt.NDArray[np.int64]
    logit_segments: tuple[RowSegment, ...]
    repeats: npt.NDArray[np.int64] | None
    prompt_rows: tuple[PromptRows, ...]

    @property
    def num_tokens(self) -> int:
        return len(self.input_ids)

    @property
    def num_sequences(self) -> int:
        return len(self.seq_lens)

"""What travels between scheduler, model runner and engine in one step. Pure Python; no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from model_worker.engine.outputs import SampledToken, TokenLogprobs
from model_worker.engine.sequence import Sequence
from registry.errors import RootgraftError


class ScheduledSequence(NamedTuple):
    """Tokens [start, start + num_tokens) of `sequence` are computed in this step; the last of them may be `drafts`.

        tokens      [ known .............................. | drafts ............... ]
        positions    start                   sequence.num_tokens      start + num_tokens

    A named tuple, because hundreds are made in each step and a frozen dataclass takes three times as long.

    `sampled` are the sequences that draw their next token from the logits of the last of these rows: none while a
    prompt is not complete, `sequence` itself when it is, and all sequences of its group in the step that completes
    the prompt they share. A decoding sequence may have `drafts`, guesses at its next tokens (see speculation): then
    `sampled` is the sequence alone, and it draws a token after its last known one and after each draft.
    """

    sequence: Sequence
    start: int
    num_tokens: int
    sampled: tuple[Sequence, ...] = ()
    drafts: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class SchedulerOutput:
    """One step's work.

    The copies (source, destination) are done before anything is computed, in the order of the fields. A step that
    swaps out swaps nothing in.

    Attributes:
        swap_out: from a block to a block of the host pool.
        swap_in: from a block of the host pool to a block.
        block_copies: copy-on-write of shared blocks. All sources are read before a destination is written.
        swapped: the sequences that `swap_out` or `swap_in` moves.
    """

    scheduled: tuple[ScheduledSequence, ...]
    swap_out: tuple[tuple[int, int], ...] = ()
    swap_in: tuple[tuple[int, int], ...] = ()
    block_copies: tuple[tuple[int, int], ...] = ()
    swapped: tuple[Sequence, ...] = ()

    @property
    def num_tokens(self) -> int:
        return sum(item.num_tokens for item in self.scheduled)

    @property
    def num_drafts(self) -> int:
        return sum(len(item.drafts) for item in self.scheduled)


@dataclass(frozen=True, slots=True)
class StepResult:
    """Answers to one SchedulerOutput.

    Attributes:
        samples: aligned with the concatenation of `sampled` over all scheduled sequences, with a further one for each
            draft of a sequence; an error instead of a token
            (logits not finite) ends that request only.
        prompt_logprobs: seq_id to the logprobs of prompt tokens at positions start + 1 ... start + num_tokens (cut at
            the prompt's end), for scheduled sequences whose sampling asks for prompt_logprobs.
        swap_s: seconds that swapping took.
    """

    samples: tuple[SampledToken | RootgraftError, ...]
    prompt_logprobs: dict[int, list[TokenLogprobs]]
    swap_s: float = 0.0

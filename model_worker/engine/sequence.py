"""The state of one sequence and of the request that it belongs to. Pure Python; no torch."""

from __future__ import annotations

from array import array
from collections.abc import MutableSequence
from dataclasses import dataclass, field
from enum import Enum, auto

from model_worker.engine.lora.variant import Variant
from model_worker.engine.outputs import FinishReason
from model_worker.engine.sampling_params import SamplingParams
from model_worker.engine.speculation.sequence_drafter import SequenceDrafter


class SequenceStatus(Enum):
    WAITING = auto()  # holds no blocks
    SWAPPED = auto()  # waits; holds blocks of the host pool
    RUNNING = auto()  # holds blocks
    FINISHED = auto()  # holds no blocks


class Sequence:
    """Prompt and output of one choice of a request.

        token_ids        [ prompt ........ | output ......... ]
        positions         0            num_prompt_tokens     num_tokens
        in the KV cache   [0, num_computed_tokens)
        to compute next   [num_computed_tokens, num_tokens)

    A sequence that is decoding has exactly one token left to compute; after preemption by recomputation it has all.
    That token may be pending: it is being drawn by the step that a device computes, and its place in `token_ids` holds
    no id yet (see step_ahead.py).

    Attributes:
        seq_id: unique in the engine's life; also the order of arrival.
        index: number of the choice in its request.
        rank: place in the order of service: (priority, seq_id).
        variant: what computes it beside the base; None: the base alone.
        weights_digest: identity of all weights that compute it; part of the prefix cache's key.
        seed: of the sequence's own random stream; the draw for position p depends on (seed, p) only.
        block_tables: for each layer group the physical block numbers, one per block_size tokens (see BlockManager).
        num_released_blocks: for each layer group, leading entries of its table that are not held any more.
        host_block_tables: while swapped, for each layer group the blocks of the host pool.
        num_pending_tokens: 1 while its last token is pending, else 0.
        output_counts: how often each token id was sampled; without a pending one.
        drafter: guesses its next tokens, once it decodes with speculation.
        may_have_drafts: False once a guess has spoiled a step.
    """

    __slots__ = (
        "_prompt_unique_ids",
        "block_hashes",
        "block_tables",
        "drafter",
        "finish_reason",
        "group",
        "host_block_tables",
        "index",
        "may_have_drafts",
        "num_cached_tokens",
        "num_computed_tokens",
        "num_entered_blocks",
        "num_pending_tokens",
        "num_prompt_tokens",
        "num_released_blocks",
        "output_counts",
        "preempted",
        "priority",
        "rank",
        "sampling",
        "seed",
        "seq_id",
        "status",
        "stop_reason",
        "token_ids",
        "variant",
        "weights_digest",
    )

    def __init__(
        self,
        seq_id: int,
        index: int,
        prompt_token_ids: list[int],
        sampling: SamplingParams,
        *,
        seed: int,
        base_digest: str = "",
        variant: Variant | None = None,
    ) -> None:
        self.seq_id = seq_id
        self.index = index
        self.priority = sampling.priority
        self.rank = (sampling.priority, seq_id)
        self.token_ids = list(prompt_token_ids)
        self.num_prompt_tokens = len(prompt_token_ids)
        self.sampling = sampling
        self.seed = seed
        self.variant = variant
        self.weights_digest = base_digest if variant is None else f"{base_digest} + {variant.digest}"
        self.status = SequenceStatus.WAITING
        self.preempted = False  # at least once
        self.num_computed_tokens = 0
        self.num_cached_tokens = 0  # of the prompt, found in the prefix cache when it was first scheduled
        self.block_tables: list[MutableSequence[int]] = [[]]
        self.num_released_blocks = [0]
        self.host_block_tables: list[list[int]] = []
        self.block_hashes: list[bytes] = []  # hash chain over the leading full blocks of token_ids, made as needed
        self.num_entered_blocks = 0  # leading full blocks that are accounted for as computed
        self.num_pending_tokens = 0
        self.output_counts: dict[int, int] = {}
        self.drafter: SequenceDrafter | None = None
        self.may_have_drafts = True
        self._prompt_unique_ids: array[int] | None = None
        self.finish_reason: FinishReason | None = None
        self.stop_reason: str | int | None = None
        self.group: SequenceGroup | None = None

    @property
    def block_table(self) -> MutableSequence[int]:
        """Of the first layer group, which is the only one of most models."""
        return self.block_tables[0]

    @block_table.setter
    def block_table(self, blocks: MutableSequence[int]) -> None:
        self.block_tables[0] = blocks

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def output_token_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def num_tokens_left(self) -> int:
        """How many more it may get. LLMEngine has put a number in place of `max_tokens` None."""
        assert self.sampling.max_tokens is not None
        return self.sampling.max_tokens - self.num_output_tokens

    @property
    def prompt_unique_ids(self) -> array[int]:
        """The distinct ids of the prompt, 64-bit; found once, when a penalty needs them."""
        if self._prompt_unique_ids is None:
            self._prompt_unique_ids = array("q", set(self.token_ids[: self.num_prompt_tokens]))
        return self._prompt_unique_ids

    @property
    def finished(self) -> bool:
        return self.status is SequenceStatus.FINISHED

    def append(self, token_id: int) -> None:
        """Add a sampled token, the pending one if there is one; its KV is computed in the next step."""
        if self.num_pending_tokens:
            self.num_pending_tokens = 0
            self.token_ids[-1] = token_id
        else:
            self.token_ids.append(token_id)
        self.output_counts[token_id] = self.output_counts.get(token_id, 0) + 1

    def expect(self) -> None:
        """A token is being drawn: keep its place, so that the step after it can be scheduled."""
        assert not self.num_pending_tokens
        self.num_pending_tokens = 1
        self.token_ids.append(0)

    def __repr__(self) -> str:
        return (
            f"Sequence({self.seq_id}, {self.status.name}, computed {self.num_computed_tokens}/{self.num_tokens}, "
            f"blocks {self.block_tables})"
        )


@dataclass(slots=True, eq=False)
class SequenceGroup:
    """One request: `sampling.n` sequences over one prompt.

    The prompt is computed once, by `sequences[0]`; when it is complete the others are forked from it and share its
    blocks (see Scheduler). `forked` says that all sequences exist on their own, which a single one does from the start.
    """

    request_id: str
    sequences: list[Sequence]
    sampling: SamplingParams
    arrival_s: float
    forked: bool = field(init=False)

    def __post_init__(self) -> None:
        self.forked = len(self.sequences) == 1
        for sequence in self.sequences:
            sequence.group = self

    @property
    def num_prompt_tokens(self) -> int:
        return self.sequences[0].num_prompt_tokens

    @property
    def finished(self) -> bool:
        return all(sequence.finished for sequence in self.sequences)

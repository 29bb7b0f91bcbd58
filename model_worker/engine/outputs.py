"""What the engine hands out after a step: one message dataclass per hop, no behaviour."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from registry.errors import RootgraftError


class FinishReason(StrEnum):
    STOP = "stop"  # an end-of-sequence id, a stop id or a stop string
    LENGTH = "length"  # max_tokens or the context length


@dataclass(frozen=True, slots=True)
class TopToken:
    token_id: int
    logprob: float


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Logprob of one token, sampled or of the prompt, and the most probable ones at its position, best first."""

    token_id: int
    logprob: float
    top: tuple[TopToken, ...]


@dataclass(frozen=True, slots=True)
class SampledToken:
    """What the sampler drew for one sequence in one step."""

    token_id: int
    logprobs: TokenLogprobs | None


@dataclass(frozen=True, slots=True)
class SequenceDelta:
    """What one sequence of a request gained since the last one. The last one has a finish_reason."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] | None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """News of one request after one step, or after several where its reader was behind.

    Exactly one output of each request has `finished` set, and nothing follows it. `error` is set only there.
    `prompt_logprobs` come once, with the first output that has deltas; entry 0 is None (nothing predicts the first
    token). Prompts of n tokens have n entries.
    """

    request_id: str
    num_prompt_tokens: int
    num_cached_tokens: int
    deltas: tuple[SequenceDelta, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    finished: bool = False
    error: RootgraftError | None = None


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A snapshot of the engine; `*_total` only grow."""

    num_running: int
    num_waiting: int
    kv_blocks_used: int
    kv_blocks_total: int
    max_loras: int  # that can be active at once
    num_active_loras: int  # now; combinations of several too
    num_lora_combinations: int  # that are known, for requests or in memory
    lora_combination_bytes: int
    prompt_tokens_total: int
    generation_tokens_total: int
    draft_tokens_total: int  # guessed, and computed on trial
    accepted_draft_tokens_total: int  # of them, those that were right
    prefix_queried_tokens_total: int
    prefix_hit_tokens_total: int
    preemptions_total: int  # by recomputation and by swapping
    preemptions_by_swap_total: int
    swapped_out_blocks_total: int
    swapped_in_blocks_total: int
    kv_host_blocks_used: int
    kv_host_blocks_total: int
    finished_total: int
    cancelled_total: int
    failed_total: int

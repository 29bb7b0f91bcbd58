"""The wire protocol between the controller and its model workers.

A leaf module: standard library, pydantic and nothing else, so that both sides can import it without pulling in the
other's dependencies. All messages are JSON over HTTP.

    worker → controller
        POST /internal/workers/register          RegisterRequest   → RegisterReply
        POST /internal/workers/{id}/heartbeat    HeartbeatRequest  → HeartbeatReply; 404: register again
        POST /internal/workers/{id}/leave        no body           → 204
        GET  /internal/blobs/{digest}            the bytes of a published file; Range is understood
        GET  /internal/versions                  VersionsReply
    controller → worker
        POST /internal/generate                  GenerateRequest   → NDJSON, one GenerateEvent a line
        POST /internal/tokenize                  TokenizeRequest   → TokenizeReply
        POST /internal/detokenize                DetokenizeRequest → DetokenizeReply
        GET  /internal/stats                     WorkerStats
        GET  /internal/variants                  VariantsReply
        POST /internal/variants/add              AddVariantRequest   → VariantStatus, once it is read and found right
        POST /internal/variants/{remove, pin, unpin, activate, evict}    NamedVariantRequest → VariantStatus

Both directions carry the shared token in the header WORKER_TOKEN_HEADER when one is configured. Errors outside a
stream have a status of 4xx or 5xx and the body ErrorEvent. A generate stream that was accepted (status 200) ends in
exactly one terminal event, `done` or `error`; a connection that closes before it is a failed worker. Blank lines
between the events only say that the worker is alive. Closing the connection from the controller's side cancels the
request in the engine.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

PROTOCOL_VERSION = 4
WORKER_TOKEN_HEADER = "x-rootgraft-worker-token"

FinishReason = Literal["stop", "length"]


class Message(BaseModel):
    """Base of all wire messages: unknown fields are a version mismatch and are refused, NaN and Infinity too."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


# ---------------------------------------------------------------------------------------------- membership


class ServedModel(Message):
    """A model that a worker serves under a public name."""

    name: str
    family: str
    max_model_len: int
    chat: bool  # has a chat template
    dtype: str
    digest: str | None = None  # sha256:..., identity of the weights, where it is known


VariantKind = Literal["lora", "delta"]
VariantState = Literal["registered", "on_disk", "in_host_memory", "active", "draining", "failed"]


class ProbePassed(Message):
    """A variant's own questions, which this worker answered as its maker had measured (docs/formats/delta.md)."""

    num_cases: int  # that were asked
    max_difference: float  # the largest of a log probability from the expected one, in nats
    tolerance: float  # what it may be here


class VariantStatus(Message):
    """A variant as one worker has it. Counters (`*_total`) only grow as long as the worker keeps the variant.

    registered: not read yet, or its probe is not answered yet; on_disk: read once, found right, and not in memory now;
    in_host_memory: ready to be made active; active: requests can run; draining: removed or replaced, but requests still
    use it; failed: see `error`.
    """

    name: str  # public name
    parent: str  # public name of the base model
    kind: VariantKind | None = None  # None: nobody has looked yet
    digest: str | None = None  # sha256:..., identity of its files; None: not read yet
    path: str  # as the worker was given it
    state: VariantState
    pinned: bool = False
    from_command_line: bool = False  # given to this worker by --lora or --delta, so not the controller's to remove
    rank: int = 0  # largest one
    host_bytes: int = 0
    active_bytes: int = 0
    num_running: int = 0
    num_waiting: int = 0
    loads_total: int = 0  # from disk
    load_s_total: float = 0.0
    activations_total: int = 0
    evictions_total: int = 0
    hits_total: int = 0  # requests that found it active
    requests_total: int = 0
    generation_tokens_total: int = 0
    probe: ProbePassed | None = None  # None: it has none, or has not answered it yet
    error: str | None = None


class AddVariantRequest(Message):
    """Adding a name again with other files replaces it; with the same files it only sets `pinned`.

    The files of a published version are fetched from the controller, see registry.published_files.
    """

    name: str
    parent: str
    path: str  # below the worker's --adapter-root; with `files`: their manifest digest
    pinned: bool = False
    files: dict[str, str] | None = None  # "sha256:…" by name


class NamedVariantRequest(Message):
    name: str


class VariantsReply(Message):
    variants: list[VariantStatus]


class VersionsReply(Message):
    """The published versions that workers should have; a worker need not keep the files of any other."""

    manifest_digests: list[str]  # see registry.published_files


class VariantReport(Message):
    """What a worker says of its variants: all of them, or what is different since an earlier report.

    A worker numbers its reports upwards, and no two alike. The controller takes one that is complete and newer than
    what it knows, and one that continues exactly what it knows. A registration's is complete. A heartbeat is answered
    with the number of the report that the controller knows then; if that is not the number that was sent, the next
    report is complete.
    """

    number: int = Field(ge=1)
    since: int | None = None  # number of the report that this one continues; None: it is complete
    variants: list[VariantStatus] = Field(default_factory=list)  # new or different ones; one of each name
    gone: list[str] = Field(default_factory=list)  # names that `since` had


class WorkerStats(Message):
    """A snapshot of one worker's engine. Counters (`*_total`) only grow during the life of the process."""

    num_running: int = 0
    num_waiting: int = 0
    kv_blocks_used: int = 0  # held by requests; blocks kept only for the prefix cache are free
    kv_blocks_total: int = 0
    draining: bool = False
    max_loras: int = 0  # most variants that are active at once; 0: it takes none
    num_active_loras: int = 0  # places of those that are in use; combinations of several variants take one each
    num_lora_combinations: int = 0  # that are known, for requests or in memory; no VariantStatus tells of them
    lora_combination_bytes: int = 0  # their memory, beside that of their parts
    prompt_tokens_total: int = 0
    generation_tokens_total: int = 0
    draft_tokens_total: int = 0  # guessed by speculative decoding, and computed on trial
    accepted_draft_tokens_total: int = 0  # of them, those that were right
    prefix_queried_tokens_total: int = 0
    prefix_hit_tokens_total: int = 0
    preemptions_total: int = 0
    preemptions_by_swap_total: int = 0
    swapped_out_blocks_total: int = 0
    swapped_in_blocks_total: int = 0
    kv_host_blocks_used: int = 0  # of the pool that preempted requests are swapped to
    kv_host_blocks_total: int = 0
    finished_total: int = 0
    cancelled_total: int = 0
    failed_total: int = 0

    @property
    def draft_acceptance_rate(self) -> float:
        """Share of the drafts that were right, since the start; 0 without drafts."""
        return self.accepted_draft_tokens_total / max(1, self.draft_tokens_total)


class RegisterRequest(Message):
    protocol_version: int
    worker_id: str
    url: str  # where the controller reaches the worker
    models: list[ServedModel]
    stats: WorkerStats
    variants: VariantReport


class RegisterReply(Message):
    heartbeat_interval_s: float


class HeartbeatRequest(Message):
    stats: WorkerStats
    variants: VariantReport


class HeartbeatReply(Message):
    report_number: int  # of the variants that the controller knows now


# ---------------------------------------------------------------------------------------------- generation


class TextPrompt(Message):
    kind: Literal["text"] = "text"
    text: str
    add_special_tokens: bool = True


class TokensPrompt(Message):
    kind: Literal["tokens"] = "tokens"
    token_ids: list[int]


class ChatMessage(Message):
    role: str
    content: str
    name: str | None = None


class ChatPrompt(Message):
    kind: Literal["chat"] = "chat"
    messages: list[ChatMessage]
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)


Prompt = Annotated[TextPrompt | TokensPrompt | ChatPrompt, Field(discriminator="kind")]


class Sampling(Message):
    """Sampling parameters; names, meanings and defaults are those of model_worker.engine.sampling_params."""

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = Field(default_factory=dict)
    seed: int | None = None
    stop: list[str] = Field(default_factory=list)
    stop_token_ids: list[int] = Field(default_factory=list)
    include_stop_str_in_output: bool = False
    min_tokens: int = 0
    max_tokens: int | None = None  # None: up to the model's context length
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    priority: int = 0


class LoraWeight(Message):
    """An adapter of a combination; its update of the base is multiplied by `scale`."""

    name: str
    scale: float = 1.0


class GenerateRequest(Message):
    """`loras` are the adapters to add to the base `model`, all at once; none: the base alone."""

    request_id: str
    model: str
    loras: list[LoraWeight] = Field(default_factory=list)
    prompt: Prompt
    sampling: Sampling
    return_prompt_text: bool = False  # for `echo`


class TokenizeRequest(Message):
    """`loras` as in GenerateRequest: fine-tunes may have a chat template and tokens of their own."""

    model: str
    loras: list[LoraWeight] = Field(default_factory=list)
    prompt: Prompt
    return_token_strs: bool = False


class TokenizeReply(Message):
    token_ids: list[int]
    token_strs: list[str] | None = None
    max_model_len: int


class DetokenizeRequest(Message):
    """`loras` as in GenerateRequest: fine-tunes may have tokens of their own."""

    model: str
    loras: list[LoraWeight] = Field(default_factory=list)
    token_ids: list[int]


class DetokenizeReply(Message):
    text: str


class TopLogprob(Message):
    token: str
    token_id: int
    logprob: float
    bytes: list[int]  # the token's own bytes, which need not be whole UTF-8 characters


class TokenLogprob(TopLogprob):
    top: list[TopLogprob] = Field(default_factory=list)


class PromptEvent(Message):
    """First event of every accepted stream."""

    kind: Literal["prompt"] = "prompt"
    num_prompt_tokens: int
    prompt_text: str | None = None
    prompt_token_strs: list[str] | None = None  # with prompt_logprobs; first entry of the logprobs below is None
    prompt_logprobs: list[TokenLogprob | None] | None = None
    fingerprint: str | None = None  # the controller adds it (controller.fingerprint); workers do not send it


class DeltaEvent(Message):
    """New text of one choice. Exactly one delta of each choice has a finish_reason, and it is the last one."""

    kind: Literal["delta"] = "delta"
    index: int
    text: str
    num_tokens: int  # sampled since the last delta of this choice
    logprobs: list[TokenLogprob] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None  # the stop string or stop token id that ended it


class DoneEvent(Message):
    kind: Literal["done"] = "done"
    num_prompt_tokens: int
    num_cached_tokens: int  # prompt tokens taken from the prefix cache
    num_completion_tokens: int


class ErrorEvent(Message):
    """`code` is a stable code of registry.errors."""

    kind: Literal["error"] = "error"
    code: str
    message: str
    param: str | None = None
    retry_after_s: float | None = None


GenerateEvent = Annotated[PromptEvent | DeltaEvent | DoneEvent | ErrorEvent, Field(discriminator="kind")]
GENERATE_EVENT: TypeAdapter[PromptEvent | DeltaEvent | DoneEvent | ErrorEvent] = TypeAdapter(GenerateEvent)

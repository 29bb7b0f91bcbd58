"""What the endpoints answer: OpenAI's objects, with vLLM's `stop_reason` and `prompt_logprobs` beside them.

Typed dicts rather than models: we build them ourselves, so they are written as JSON without being checked again.
"""

from __future__ import annotations

from typing import Literal, NotRequired

from typing_extensions import TypedDict

from controller.protocol import FinishReason


class PromptTokensDetails(TypedDict):
    cached_tokens: int


class Usage(TypedDict):
    """Each prompt counts once, however many choices it has."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class PromptTokenLogprob(TypedDict):
    logprob: float
    rank: int | None  # 1 is the most probable; null beyond those that were asked for
    decoded_token: str


PromptLogprobs = list[dict[str, PromptTokenLogprob] | None]  # by token id, as JSON has no integer keys


class ChatTopLogprob(TypedDict):
    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(ChatTopLogprob):
    top_logprobs: list[ChatTopLogprob]


class ChatLogprobs(TypedDict):
    content: list[ChatTokenLogprob]
    refusal: None


class ReplyMessage(TypedDict):
    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(TypedDict):
    index: int
    message: ReplyMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason
    stop_reason: str | int | None


class ChatCompletion(TypedDict):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str | None  # see controller.fingerprint
    choices: list[ChatChoice]
    usage: Usage
    prompt_logprobs: NotRequired[PromptLogprobs | None]


class CompletionLogprobs(TypedDict):
    """Lists of one length, an entry for each token; the first token of an echoed prompt has null logprobs."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(TypedDict):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason
    stop_reason: str | int | None
    prompt_logprobs: NotRequired[PromptLogprobs | None]


class Completion(TypedDict):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str | None  # see controller.fingerprint
    choices: list[CompletionChoice]
    usage: Usage


class ModelObject(TypedDict):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str  # a variant's path; a model's own name
    parent: str | None  # a variant's base model
    max_model_len: int


class ModelList(TypedDict):
    object: Literal["list"]
    data: list[ModelObject]


class ErrorFields(TypedDict):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorObject(TypedDict):
    error: ErrorFields

"""The body of POST /v1/chat/completions."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, StringConstraints, model_validator
from pydantic_core import PydanticCustomError

from controller.openai.body import RequestModel
from controller.openai.schemas import (
    MAX_INT,
    MAX_LOGPROBS,
    ChatTemplateKwargs,
    GenerationRequest,
    Hint,
    Unsupported,
)
from controller.protocol import ChatMessage, ChatPrompt, Sampling
from registry.errors import InvalidRequestError


class TextPart(RequestModel):
    type: Literal["text"]
    text: str


def _text_of_parts(content: Any) -> Any:
    """The one text of a list of text parts, joined by line breaks as vLLM does."""
    if not isinstance(content, list):
        return content
    if not content:
        raise PydanticCustomError("not_supported", "content must hold at least one part.")
    texts: list[str] = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if not isinstance(part, dict) or not isinstance(kind, str):
            raise PydanticCustomError("not_supported", "content must be a string or a list of text parts.")
        if kind != "text":
            raise PydanticCustomError(
                "not_supported", "content parts of type {kind} are not supported; send text parts.", {"kind": kind[:60]}
            )
        if part.keys() != {"type", "text"} or not isinstance(part["text"], str):
            raise PydanticCustomError(
                "not_supported", 'a text part must be {{"type": "text", "text": a string}} and nothing else.'
            )
        texts.append(part["text"])
    return "\n".join(texts)


def _served_role(role: Any) -> Any:
    if role in ("tool", "function"):
        raise PydanticCustomError(
            "not_supported",
            "messages of role {role} are not supported: this server does not call tools.",
            {"role": role},
        )
    return role


class ChatMessageParam(RequestModel):
    """One message. The fields after `name` exist so that our own replies can be sent back as they came."""

    role: Annotated[Literal["system", "developer", "user", "assistant"], BeforeValidator(_served_role)]
    content: Annotated[str, BeforeValidator(_text_of_parts, json_schema_input_type=str | list[TextPart])]
    name: Annotated[str, StringConstraints(min_length=1, max_length=64)] | None = None
    refusal: Unsupported = None
    audio: Unsupported = None
    function_call: Unsupported = None
    tool_calls: Annotated[list[None], Field(max_length=0)] | None = None
    annotations: Annotated[list[None], Field(max_length=0)] | None = None


def _free_text(kind: Any) -> Any:
    if kind in ("json_object", "json_schema"):
        raise PydanticCustomError(
            "not_supported",
            "response_format of type {kind} is not supported: this server does not constrain answers; leave it out, "
            "ask for JSON in the messages, and check the answer.",
            {"kind": kind},
        )
    return kind


class TextResponseFormat(RequestModel):
    type: Annotated[Literal["text"], BeforeValidator(_free_text)]


class ChatCompletionRequest(GenerationRequest):
    messages: list[ChatMessageParam] = Field(min_length=1)
    max_tokens: int | None = Field(default=None, ge=1, le=MAX_INT)
    max_completion_tokens: int | None = Field(default=None, ge=1, le=MAX_INT)
    logprobs: bool = False
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    add_generation_prompt: bool | None = Field(default=None, description="Default: unless continue_final_message.")
    continue_final_message: bool = False
    chat_template_kwargs: ChatTemplateKwargs = Field(default_factory=dict)

    response_format: TextResponseFormat | None = None
    modalities: list[Literal["text"]] | None = Field(default=None, min_length=1, max_length=1)
    parallel_tool_calls: bool | None = None  # without tools it has nothing to act on
    safety_identifier: Hint | None = None
    prompt_cache_key: Hint | None = Field(
        default=None, description="Requests with one key go to one replica if possible."
    )

    tools: Unsupported = None
    tool_choice: Unsupported = None
    functions: Unsupported = None
    function_call: Unsupported = None
    audio: Unsupported = None
    prediction: Unsupported = None
    reasoning_effort: Unsupported = None
    verbosity: Unsupported = None
    web_search_options: Unsupported = None
    moderation: Unsupported = None
    prompt_cache_options: Unsupported = None
    prompt_cache_retention: Unsupported = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        self.check_stream_fields()
        if self.top_logprobs and not self.logprobs:
            raise InvalidRequestError("top_logprobs needs logprobs: true.", param="top_logprobs")
        limits = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(limits) > 1:
            raise InvalidRequestError(
                "max_tokens and max_completion_tokens mean the same; send one of them.", param="max_completion_tokens"
            )
        check_final_message_fields(self.add_generation_prompt, self.continue_final_message)
        return self

    def to_prompt(self) -> ChatPrompt:
        return chat_prompt(
            self.messages, self.add_generation_prompt, self.continue_final_message, self.chat_template_kwargs
        )

    def sampling(self) -> Sampling:
        """Raises: InvalidRequestError."""
        return self.to_sampling(
            max_tokens=self.max_completion_tokens if self.max_tokens is None else self.max_tokens,
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
            prompt_logprobs=self.prompt_logprobs,
        )


def check_final_message_fields(add_generation_prompt: bool | None, continue_final_message: bool) -> None:
    """Raises: InvalidRequestError, when the final message is to be both continued and answered."""
    if add_generation_prompt and continue_final_message:
        raise InvalidRequestError(
            "continue_final_message and add_generation_prompt exclude each other; set one of them.",
            param="continue_final_message",
        )


def chat_prompt(
    messages: list[ChatMessageParam],
    add_generation_prompt: bool | None,
    continue_final_message: bool,
    chat_template_kwargs: dict[str, Any],
) -> ChatPrompt:
    """The wire form of a conversation; a developer message is a system message under its newer name."""
    return ChatPrompt(
        messages=[
            ChatMessage(
                role="system" if message.role == "developer" else message.role,
                content=message.content,
                name=message.name,
            )
            for message in messages
        ],
        add_generation_prompt=not continue_final_message if add_generation_prompt is None else add_generation_prompt,
        continue_final_message=continue_final_message,
        chat_template_kwargs=chat_template_kwargs,
    )

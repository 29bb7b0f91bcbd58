"""The bodies of POST /tokenize and /detokenize; names, defaults and replies are vLLM's."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator
from typing_extensions import TypedDict

from controller.openai.body import RequestModel
from controller.openai.schemas import ChatTemplateKwargs, ModelName, TokenId
from controller.openai.schemas_chat import ChatMessageParam, chat_prompt, check_final_message_fields
from controller.protocol import ChatPrompt, TextPrompt
from registry.errors import InvalidRequestError

_CHAT_ONLY = ("add_generation_prompt", "continue_final_message", "chat_template_kwargs")


class TokenizeBody(RequestModel):
    """A text in `prompt`, or a conversation in `messages`."""

    model: ModelName | None = Field(default=None, description="May be left out where one model is served.")
    prompt: str | None = None
    messages: list[ChatMessageParam] | None = Field(default=None, min_length=1)
    add_special_tokens: bool | None = Field(default=None, description="Default: true with prompt, false with messages.")
    return_token_strs: bool = False
    add_generation_prompt: bool | None = Field(default=None, description="Default: unless continue_final_message.")
    continue_final_message: bool = False
    chat_template_kwargs: ChatTemplateKwargs = Field(default_factory=dict)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.prompt is None and self.messages is None:
            raise InvalidRequestError("prompt or messages is required.", param="prompt")
        if self.messages is None:
            for name in _CHAT_ONLY:
                if name in self.model_fields_set:
                    raise InvalidRequestError(f"{name} needs messages; a prompt is not rendered.", param=name)
            return self
        if self.prompt is not None:
            raise InvalidRequestError("prompt and messages exclude each other; send one of them.", param="prompt")
        if self.add_special_tokens:
            raise InvalidRequestError(
                "add_special_tokens is not supported with messages: the chat template writes them; leave it out.",
                param="add_special_tokens",
            )
        check_final_message_fields(self.add_generation_prompt, self.continue_final_message)
        return self

    def to_prompt(self) -> TextPrompt | ChatPrompt:
        if self.messages is not None:
            return chat_prompt(
                self.messages, self.add_generation_prompt, self.continue_final_message, self.chat_template_kwargs
            )
        assert self.prompt is not None
        return TextPrompt(text=self.prompt, add_special_tokens=self.add_special_tokens is not False)


class DetokenizeBody(RequestModel):
    model: ModelName | None = Field(default=None, description="May be left out where one model is served.")
    tokens: list[TokenId]


class TokenizeResult(TypedDict):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeResult(TypedDict):
    prompt: str

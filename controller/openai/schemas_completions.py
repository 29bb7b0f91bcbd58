"""The body of POST /v1/completions."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from controller.openai.schemas import MAX_INT, MAX_LOGPROBS, GenerationRequest, Unsupported
from controller.protocol import Sampling, TextPrompt, TokensPrompt
from registry.errors import InvalidRequestError

MAX_PROMPTS = 128

_PROMPT_SCHEMA = str | list[str] | list[int] | list[list[int]]


def _prompts(value: Any) -> list[str] | list[list[int]]:
    """One of the four forms of `prompt` as a list of prompts, all texts or all token ids."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        raise PydanticCustomError(
            "not_supported", "prompt must be a string, a list of strings, a list of token ids or a list of such lists."
        )
    if not value:
        raise PydanticCustomError("not_supported", "prompt must not be an empty list.")
    prompts = [value] if type(value[0]) is int else value
    if len(prompts) > MAX_PROMPTS:
        raise PydanticCustomError(
            "not_supported",
            "prompt holds at most {most} prompts, got {num}.",
            {"most": MAX_PROMPTS, "num": len(prompts)},
        )
    if all(isinstance(prompt, str) for prompt in prompts):
        return prompts
    for prompt in prompts:
        if not isinstance(prompt, list) or not all(type(item) is int and 0 <= item <= MAX_INT for item in prompt):
            raise PydanticCustomError("not_supported", "prompt must hold strings only, or token ids (integers) only.")
        if not prompt:
            raise PydanticCustomError("not_supported", "prompt must not hold an empty list of token ids.")
    return prompts


Prompts = Annotated[list[str] | list[list[int]], BeforeValidator(_prompts, json_schema_input_type=_PROMPT_SCHEMA)]


class CompletionRequest(GenerationRequest):
    prompt: Prompts
    max_tokens: int = Field(default=16, ge=1, le=MAX_INT)
    logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    echo: bool = False
    add_special_tokens: bool = True
    best_of: int | None = Field(default=None, description="Only as a repetition of n.")
    suffix: Unsupported = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        self.check_stream_fields()
        if self.best_of is not None and self.best_of != self.n:
            raise InvalidRequestError(
                f"best_of is only supported when it equals n ({self.n}), got {self.best_of}; ask for n and choose.",
                param="best_of",
            )
        return self

    def to_prompts(self) -> list[TextPrompt | TokensPrompt]:
        return [
            TextPrompt(text=prompt, add_special_tokens=self.add_special_tokens)
            if isinstance(prompt, str)
            else TokensPrompt(token_ids=prompt)
            for prompt in self.prompt
        ]

    def sampling(self) -> Sampling:
        """With `echo`, `logprobs` cover the prompt too. Raises: InvalidRequestError."""
        wanted = [self.prompt_logprobs, self.logprobs if self.echo else None]
        return self.to_sampling(
            max_tokens=self.max_tokens,
            logprobs=self.logprobs,
            prompt_logprobs=max((count for count in wanted if count is not None), default=None),
        )

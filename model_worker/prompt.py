"""From a prompt as the controller sends it to token ids."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from adapters.chat_template import ChatTemplate
from adapters.tokenizer import Tokenizer
from controller.protocol import ChatPrompt, Prompt, TextPrompt, TokensPrompt
from registry.errors import InvalidRequestError

T = TypeVar("T")

MAX_INLINE_CHARS = 2_000
"""Longer texts are tokenized in a thread: a tokenizer takes about a microsecond a character, and the event loop must
not stop for more than a few milliseconds."""
MESSAGE_COST_CHARS = 50
"""What rendering one message costs, as characters of text."""
RESERVED_KWARGS = frozenset({"messages", "add_generation_prompt", "continue_final_message"})


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    """Token ids of a prompt, the text that they came from (None: it came as ids) and the field that held it."""

    token_ids: list[int]
    text: str | None
    param: str
    stop: tuple[str, ...]  # of the chat template


class PromptEncoder:
    """Renders chats and tokenizes texts; owns the thread in which long ones are done."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(max_workers=2, thread_name_prefix="tokenize")

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def decode(self, token_ids: list[int], tokenizer: Tokenizer) -> str:
        """Text of `token_ids`, special tokens included.

        Raises:
            InvalidRequestError: an id is outside the vocabulary.
        """
        _check_vocabulary(token_ids, tokenizer, "tokens")

        def decode() -> str:
            return tokenizer.decode(token_ids, skip_special_tokens=False)

        return await self._run(decode, len(token_ids))

    async def token_strs(self, token_ids: list[int], tokenizer: Tokenizer) -> list[str]:
        """The vocabulary's own spelling of each token."""

        def spell() -> list[str]:
            return [tokenizer.token_str(token_id) for token_id in token_ids]

        return await self._run(spell, len(token_ids))

    async def encode(self, prompt: Prompt, tokenizer: Tokenizer, chat_template: ChatTemplate | None) -> EncodedPrompt:
        """Token ids of `prompt`, a chat rendered by `chat_template`.

        Raises:
            InvalidRequestError: the model has no chat template or it refuses the conversation, or an id is outside the
                vocabulary.
        """
        match prompt:
            case TokensPrompt():
                _check_vocabulary(prompt.token_ids, tokenizer, "prompt")
                return EncodedPrompt(prompt.token_ids, None, "prompt", ())
            case TextPrompt():
                return await self._run(lambda: _encode_text(prompt, tokenizer), len(prompt.text))
            case ChatPrompt():
                num_chars = sum(len(message.content) + MESSAGE_COST_CHARS for message in prompt.messages)
                return await self._run(lambda: _encode_chat(prompt, tokenizer, chat_template), num_chars)

    async def _run(self, work: Callable[[], T], num_chars: int) -> T:
        if num_chars <= MAX_INLINE_CHARS:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)


def _encode_text(prompt: TextPrompt, tokenizer: Tokenizer) -> EncodedPrompt:
    token_ids = tokenizer.encode(prompt.text, add_special_tokens=prompt.add_special_tokens)
    return EncodedPrompt(token_ids, prompt.text, "prompt", ())


def _encode_chat(prompt: ChatPrompt, tokenizer: Tokenizer, template: ChatTemplate | None) -> EncodedPrompt:
    if template is None:
        raise InvalidRequestError(
            "This model has no chat template. Use /v1/completions, or start its worker with --chat-template "
            "(`python -m adapters list` names the templates that come with rootgraft).",
            param="messages",
        )
    reserved = RESERVED_KWARGS & prompt.chat_template_kwargs.keys()
    if reserved:
        name = min(reserved)
        raise InvalidRequestError(
            f"chat_template_kwargs must not hold {name}; it is a field of its own.", param="chat_template_kwargs"
        )
    text = template.render(
        [message.model_dump(exclude_none=True) for message in prompt.messages],
        add_generation_prompt=prompt.add_generation_prompt,
        continue_final_message=prompt.continue_final_message,
        **prompt.chat_template_kwargs,
    )
    # The template writes the special tokens itself.
    token_ids = tokenizer.encode(text, add_special_tokens=False)
    return EncodedPrompt(token_ids, text, "messages", template.stop)


def _check_vocabulary(token_ids: list[int], tokenizer: Tokenizer, param: str) -> None:
    vocab_size = tokenizer.vocab_size
    for token_id in token_ids:
        if not 0 <= token_id < vocab_size:
            raise InvalidRequestError(
                f"Token id {token_id} is outside the model's vocabulary of {vocab_size}.", param=param
            )

"""Logprobs of tokens in the three forms that clients know."""

from __future__ import annotations

from collections.abc import Sequence

from controller.openai.schemas_responses import (
    ChatLogprobs,
    ChatTopLogprob,
    CompletionLogprobs,
    PromptLogprobs,
    PromptTokenLogprob,
)
from controller.protocol import PromptEvent, TokenLogprob, TopLogprob


def chat_logprobs(tokens: Sequence[TokenLogprob]) -> ChatLogprobs:
    return {
        "content": [
            {**_chat_token(token), "top_logprobs": [_chat_token(top) for top in token.top]} for token in tokens
        ],
        "refusal": None,
    }


def _chat_token(token: TopLogprob) -> ChatTopLogprob:
    return {"token": token.token, "logprob": token.logprob, "bytes": token.bytes}


class CompletionLogprobsWriter:
    """The form of /v1/completions for one choice; `text_offset` goes on through the chunks of a stream.

    An offset is that of the character in which the token begins, counted over the bytes of the tokens before it.
    """

    def __init__(self) -> None:
        self._num_chars = 0

    def prompt(self, event: PromptEvent, num_top: int) -> CompletionLogprobs:
        """The prompt of an echo; `event` has prompt logprobs, perhaps of more tokens than num_top."""
        tokens, strs = event.prompt_logprobs or [], event.prompt_token_strs or []
        if not tokens:
            return self._empty()
        first_str = strs[0] if strs else ""
        result = self.sampled([token for token in tokens[1:] if token is not None], num_top, first_char=len(first_str))
        return {
            "tokens": [first_str, *result["tokens"]],
            "token_logprobs": [None, *result["token_logprobs"]],  # nothing predicts the first token
            "top_logprobs": [None, *result["top_logprobs"]],
            "text_offset": [0, *result["text_offset"]],
        }

    def sampled(self, tokens: Sequence[TokenLogprob], num_top: int, *, first_char: int = 0) -> CompletionLogprobs:
        """Tokens that follow those of earlier calls, `first_char` characters later."""
        self._num_chars += first_char
        result = self._empty()
        for token in tokens:
            result["tokens"].append(token.token)
            result["token_logprobs"].append(token.logprob)
            top: dict[str, float] = {}
            for candidate in (*token.top[:num_top], token):
                top.setdefault(candidate.token, candidate.logprob)  # parts of characters look alike; the best one stays
            result["top_logprobs"].append(top)
            inside_char = bool(token.bytes) and _continues(token.bytes[0])
            result["text_offset"].append(max(self._num_chars - inside_char, 0))
            self._num_chars += sum(not _continues(byte) for byte in token.bytes)
        return result

    @staticmethod
    def _empty() -> CompletionLogprobs:
        return {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}


def joined(first: CompletionLogprobs, second: CompletionLogprobs) -> CompletionLogprobs:
    return {
        "tokens": first["tokens"] + second["tokens"],
        "token_logprobs": first["token_logprobs"] + second["token_logprobs"],
        "top_logprobs": first["top_logprobs"] + second["top_logprobs"],
        "text_offset": first["text_offset"] + second["text_offset"],
    }


def prompt_logprobs(event: PromptEvent, num_top: int) -> PromptLogprobs | None:
    """vLLM's `prompt_logprobs`: for each prompt token the most probable ones and itself, by token id."""
    if event.prompt_logprobs is None:
        return None
    return [None if token is None else _by_token_id(token, num_top) for token in event.prompt_logprobs]


def _by_token_id(token: TokenLogprob, num_top: int) -> dict[str, PromptTokenLogprob]:
    entries: dict[str, PromptTokenLogprob] = {
        str(top.token_id): {"logprob": top.logprob, "rank": rank, "decoded_token": top.token}
        for rank, top in enumerate(token.top[:num_top], start=1)
    }
    entries.setdefault(str(token.token_id), {"logprob": token.logprob, "rank": None, "decoded_token": token.token})
    return entries


def _continues(byte: int) -> bool:
    """Whether a byte goes on with a UTF-8 character that an earlier one began."""
    return byte & 0xC0 == 0x80

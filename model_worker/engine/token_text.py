"""What each sampled token adds to the text that no further token can change."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Protocol

from adapters.tokenizer import Tokenizer

_CONTEXT_BYTES = 8  # of the prompt; more than a character, and never less than a token
_MAX_INCOMPLETE_BYTES = 3  # a character has at most 4


class TokenText(Protocol):
    """The text of one sequence, token by token."""

    def append(self, token_id: int) -> str:
        """What is certain of the text with this token and was not before."""

    def flush(self) -> str:
        """The rest of the text, for a sequence that has ended: an incomplete character is U+FFFD."""


def token_text(tokenizer: Tokenizer, prompt_token_ids: Sequence[int], *, skip_special_tokens: bool) -> TokenText:
    """For the output that continues a prompt; only the prompt's end is looked at, and it is not kept."""
    kind = ByteText if tokenizer.text_is_bytes else WindowText
    return kind(tokenizer, prompt_token_ids, skip_special_tokens=skip_special_tokens)


class ByteText:
    """For tokenizers whose text is the bytes of the tokens read as UTF-8 (`Tokenizer.text_is_bytes`)."""

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int], *, skip_special_tokens: bool) -> None:
        self._token_bytes = tokenizer.token_bytes
        self._left_out = tokenizer.special_ids if skip_special_tokens else frozenset[int]()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        context = b""
        for token_id in reversed(prompt_token_ids):
            if len(context) >= _CONTEXT_BYTES:
                break
            if token_id not in self._left_out:
                context = self._token_bytes(token_id) + context
        self._decoder.decode(context)  # keeps the beginning of a character that the prompt ends with

    def append(self, token_id: int) -> str:
        return "" if token_id in self._left_out else self._decoder.decode(self._token_bytes(token_id))

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class WindowText:
    """For every tokenizer.

        tokens      [ released .......... | context | pending ]     window = context + pending, a few tokens

    A tokenizer can only decode whole sequences: the text of a token depends on the bytes and, with SentencePiece, on
    the token before it. So the text of new tokens is the text of a short window less the part of it that was released
    before; the cost of a token does not grow with the length of the text.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int], *, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._tail = b""  # the last bytes, in which an incomplete character can be
        self._window = self._end_of(prompt_token_ids)
        text, self._num_context = self._settled()
        self._num_released = len(text)  # characters of the window's text

    def append(self, token_id: int) -> str:
        token = self._bytes_in_text(token_id)
        if not token:
            return ""
        self._window.append(token_id)
        self._tail = (self._tail + token)[-_MAX_INCOMPLETE_BYTES:]
        text, num_tokens = self._settled()
        new = text[self._num_released :]
        if new:  # else the context stays, so that it is never without text
            del self._window[: self._num_context]
            self._num_context = num_tokens - self._num_context
            self._num_released = len(self._settled()[0])
        return new

    def flush(self) -> str:
        text = self._decode(self._window)[self._num_released :]
        self._window, self._tail, self._num_context, self._num_released = [], b"", 0, 0
        return text

    def _settled(self) -> tuple[str, int]:
        """The window's text without an incomplete character at its end, and how many tokens lie in it entirely."""
        num_bytes = len(self._tail) - codecs.utf_8_decode(self._tail, "replace", False)[1]
        num_tokens = len(self._window)
        while num_bytes > 0:
            num_tokens -= 1
            num_bytes -= len(self._bytes_in_text(self._window[num_tokens]))
        if num_bytes == 0:
            return self._decode(self._window[:num_tokens]), num_tokens
        # A token of byte-level BPE that ends within a character; its incomplete bytes are one U+FFFD.
        return self._decode(self._window)[:-1], num_tokens

    def _end_of(self, prompt_token_ids: Sequence[int]) -> list[int]:
        window: list[int] = []
        content = b""
        for token_id in reversed(prompt_token_ids):
            if len(content) >= _CONTEXT_BYTES:
                break
            token = self._bytes_in_text(token_id)
            if token:
                window.append(token_id)
                content = token + content
        self._tail = content[-_MAX_INCOMPLETE_BYTES:]
        return window[::-1]

    def _bytes_in_text(self, token_id: int) -> bytes:
        if self._skip_special_tokens and token_id in self._tokenizer.special_ids:
            return b""
        return self._tokenizer.token_bytes(token_id)

    def _decode(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=self._skip_special_tokens)

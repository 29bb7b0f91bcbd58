"""Text from token ids as they are sampled: no character is split, and no part of a stop string gets out.

    tokens      [ released .......... | context | pending ]     window = context + pending, a few tokens
    text        [ released .......... ........ | held ]         held: may be the beginning of a stop string

A tokenizer can only decode whole sequences: the text of a token depends on the bytes and, with SentencePiece, on the
token before it. So the text of new tokens is the text of a short window less the part of it that was released before;
the cost of a token does not grow with the length of the text.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import dataclass

from adapters.tokenizer import Tokenizer

_CONTEXT_BYTES = 8  # of the prompt; more than a character, and never less than a token
_MAX_INCOMPLETE_BYTES = 3  # a character has at most 4


@dataclass(frozen=True, slots=True)
class DetokenizedText:
    """Text that can be shown, and the stop string that ended it, if one did."""

    text: str
    stop_string: str | None


class IncrementalDetokenizer:
    """The text of one sequence.

    All released text together is `decode(prompt + output)` without `decode(prompt)`, cut at the first stop string: the
    one that is complete first; of those that end at the same character, the longest. Incomplete UTF-8 is held back
    until it is complete or certain to be invalid, which is at most three tokens; then U+FFFD comes out. A byte-fallback
    decoder turns a whole run of bytes into U+FFFD when one of them is invalid; characters of such a run that were
    complete before stay released.

    Args:
        tokenizer: of the model.
        prompt_token_ids: what the output continues; only its end is looked at, and it is not kept.
        skip_special_tokens: leave special tokens out of the text.
        stop: strings that end the text.
        include_stop_str_in_output: release the stop string too.
        min_tokens: stop strings are not looked for in the text of this many first tokens.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_token_ids: Sequence[int],
        *,
        skip_special_tokens: bool,
        stop: tuple[str, ...],
        include_stop_str_in_output: bool,
        min_tokens: int,
    ) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._stop = stop
        self._include_stop = include_stop_str_in_output
        self._min_tokens = min_tokens
        self._num_tokens = 0
        self._held = ""
        self._stopped = False
        self._tail = b""  # the last bytes, in which an incomplete character can be
        self._window = self._end_of(prompt_token_ids)
        text, self._num_context = self._settled()
        self._num_released = len(text)  # characters of the window's text

    def append(self, token_ids: Sequence[int]) -> DetokenizedText:
        """Add sampled tokens; after a stop string nothing more is added."""
        released: list[str] = []
        for token_id in token_ids:
            assert not self._stopped, "a token after the stop string"
            new = self._append(token_id)
            released.append(new.text)
            if new.stop_string is not None:
                return DetokenizedText("".join(released), new.stop_string)
        return DetokenizedText("".join(released), None)

    def flush(self) -> str:
        """The text still held back, for a sequence that has ended; nothing after a stop string."""
        if self._stopped:
            return ""
        text = self._held + self._decode(self._window)[self._num_released :]
        self._held = ""
        self._window, self._tail, self._num_context, self._num_released = [], b"", 0, 0
        return text

    def _append(self, token_id: int) -> DetokenizedText:
        self._num_tokens += 1
        text = self._new_text(token_id)
        if not self._stop or self._num_tokens <= self._min_tokens:
            return DetokenizedText(text, None)
        text = self._held + text
        match = _first_match(text, self._stop)
        if match is not None:
            start, stop = match
            self._stopped = True
            self._held = ""
            return DetokenizedText(text[: start + len(stop) if self._include_stop else start], stop)
        num_held = _num_beginning_a_stop(text, self._stop)
        self._held = text[len(text) - num_held :]
        return DetokenizedText(text[: len(text) - num_held], None)

    def _new_text(self, token_id: int) -> str:
        """What one token adds to the text that no further token can change."""
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


def _first_match(text: str, stop: tuple[str, ...]) -> tuple[int, str] | None:
    """Start and text of the stop string that is complete first; of those that end together the longest."""
    matches = [(start, string) for string in stop if (start := text.find(string)) >= 0]
    return min(matches, key=lambda match: (match[0] + len(match[1]), match[0]), default=None)


def _num_beginning_a_stop(text: str, stop: tuple[str, ...]) -> int:
    """Length of the longest end of `text` with which a stop string begins."""
    longest = min(len(text), max(map(len, stop)) - 1)
    return next((num for num in range(longest, 0, -1) if any(s.startswith(text[-num:]) for s in stop)), 0)

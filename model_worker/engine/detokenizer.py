"""Text from token ids as they are sampled: no character is split, and no part of a stop string gets out.

text        [ released .................. | held ]          held: may be the beginning of a stop string
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from adapters.tokenizer import Tokenizer
from model_worker.engine.token_text import token_text


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
        self._text = token_text(tokenizer, prompt_token_ids, skip_special_tokens=skip_special_tokens)
        self._stop = stop
        self._stop_firsts = frozenset(string[0] for string in stop)
        self._max_held = max(map(len, stop), default=1) - 1
        self._include_stop = include_stop_str_in_output
        self._min_tokens = min_tokens
        self._num_tokens = 0
        self._held = ""
        self._stopped = False

    def append(self, token_ids: Sequence[int]) -> DetokenizedText:
        """Add sampled tokens; after a stop string nothing more is added."""
        if len(token_ids) == 1 and not self._stopped:  # mostly
            return self._append(token_ids[0])
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
        text = self._held + self._text.flush()
        self._held = ""
        return text

    def _append(self, token_id: int) -> DetokenizedText:
        self._num_tokens += 1
        text = self._text.append(token_id)
        if not self._stop or self._num_tokens <= self._min_tokens:
            return DetokenizedText(text, None)
        text = self._held + text
        match = _first_match(text, self._stop)
        if match is not None:
            start, stop = match
            self._stopped = True
            self._held = ""
            return DetokenizedText(text[: start + len(stop) if self._include_stop else start], stop)
        num_held = self._num_beginning_a_stop(text)
        self._held = text[len(text) - num_held :]
        return DetokenizedText(text[: len(text) - num_held], None)

    def _num_beginning_a_stop(self, text: str) -> int:
        """Length of the longest end of `text` with which a stop string begins."""
        for num in range(min(len(text), self._max_held), 0, -1):
            if text[-num] in self._stop_firsts and any(string.startswith(text[-num:]) for string in self._stop):
                return num
        return 0


def _first_match(text: str, stop: tuple[str, ...]) -> tuple[int, str] | None:
    """Start and text of the stop string that is complete first; of those that end together the longest."""
    matches = [(start, string) for string in stop if (start := text.find(string)) >= 0]
    return min(matches, key=lambda match: (match[0] + len(match[1]), match[0]), default=None)

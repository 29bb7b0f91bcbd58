"""From the engine's outputs to the events of the wire protocol."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from adapters.tokenizer import Tokenizer
from controller.protocol import DeltaEvent, DoneEvent, ErrorEvent, PromptEvent, TokenLogprob, TopLogprob
from model_worker.engine.outputs import FinishReason, RequestOutput, SequenceDelta, TokenLogprobs
from registry.errors import InternalError, RootgraftError

MIN_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON cannot write; as in OpenAI's API."""

Event = PromptEvent | DeltaEvent | DoneEvent | ErrorEvent


def error_event(error: RootgraftError) -> ErrorEvent:
    return ErrorEvent(code=error.code, message=error.message, param=error.param, retry_after_s=error.retry_after_s)


class TokenNames:
    """Text and bytes of tokens, remembered: logprobs name many tokens for each one sampled."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._names: dict[int, tuple[str, list[int]]] = {}  # at most one entry a token of the vocabulary

    def __call__(self, token_id: int) -> tuple[str, list[int]]:
        """Text (a partial UTF-8 character shows as U+FFFD) and bytes of one token."""
        name = self._names.get(token_id)
        if name is None:
            data = self._tokenizer.token_bytes(token_id)
            name = self._names[token_id] = (data.decode("utf-8", errors="replace"), list(data))
        return name


class EventBuilder:
    """Turns the outputs of one request into events: one PromptEvent, deltas, one DoneEvent or ErrorEvent."""

    def __init__(self, names: TokenNames, token_ids: Sequence[int], *, prompt_text: str | None) -> None:
        self._names = names
        self._prompt_token_ids = token_ids
        self._prompt_text = prompt_text
        self._num_completion_tokens = 0
        self.started = False  # the PromptEvent was built

    def build(self, output: RequestOutput) -> list[Event]:
        """Events of one output; the last of them is terminal when the output is.

        Raises:
            RootgraftError: the request failed before it gave anything, so that it can still be refused.
        """
        if output.error is not None:
            if not self.started:
                raise output.error
            return [error_event(output.error)]
        if not output.deltas and not output.finished:
            return []
        events: list[Event] = []
        if not self.started:
            self.started = True
            events.append(self._prompt_event(output))
        for delta in output.deltas:
            self._num_completion_tokens += len(delta.token_ids)
            events.append(self._delta_event(delta))
        if output.finished:
            events.append(
                DoneEvent(
                    num_prompt_tokens=output.num_prompt_tokens,
                    num_cached_tokens=output.num_cached_tokens,
                    num_completion_tokens=self._num_completion_tokens,
                )
            )
        return events

    def _prompt_event(self, output: RequestOutput) -> PromptEvent:
        token_strs: list[str] | None = None
        logprobs: list[TokenLogprob | None] | None = None
        if output.prompt_logprobs is not None:
            token_strs = [self._names(token_id)[0] for token_id in self._prompt_token_ids]
            logprobs = [None if entry is None else self._logprob(entry) for entry in output.prompt_logprobs]
        return PromptEvent(
            num_prompt_tokens=output.num_prompt_tokens,
            prompt_text=self._prompt_text,
            prompt_token_strs=token_strs,
            prompt_logprobs=logprobs,
        )

    def _delta_event(self, delta: SequenceDelta) -> DeltaEvent:
        return DeltaEvent(
            index=delta.index,
            text=delta.text,
            num_tokens=len(delta.token_ids),
            logprobs=None if delta.logprobs is None else [self._logprob(entry) for entry in delta.logprobs],
            finish_reason=_FINISH_REASON[delta.finish_reason],
            stop_reason=delta.stop_reason,
        )

    def _logprob(self, entry: TokenLogprobs) -> TokenLogprob:
        token, data = self._names(entry.token_id)
        return TokenLogprob(
            token=token,
            token_id=entry.token_id,
            logprob=_finite(entry.logprob),
            bytes=data,
            top=[self._top(top.token_id, top.logprob) for top in entry.top],
        )

    def _top(self, token_id: int, logprob: float) -> TopLogprob:
        token, data = self._names(token_id)
        return TopLogprob(token=token, token_id=token_id, logprob=_finite(logprob), bytes=data)


_FINISH_REASON: dict[FinishReason | None, Literal["stop", "length"] | None] = {
    None: None,
    FinishReason.STOP: "stop",
    FinishReason.LENGTH: "length",
}


def _finite(logprob: float) -> float:
    if math.isnan(logprob):
        raise InternalError("The model computed logits that are not numbers; its weights or dtype are unusable.")
    return max(logprob, MIN_LOGPROB)

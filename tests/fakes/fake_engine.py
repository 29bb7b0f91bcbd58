"""An engine without a model: the seam of AsyncLLMEngine, with answers that a test chooses."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import fields, replace

from adapters.tokenizer import Tokenizer
from model_worker.engine.lora.lora_weight import LoraWeight
from model_worker.engine.outputs import (
    EngineStats,
    FinishReason,
    RequestOutput,
    SequenceDelta,
    TokenLogprobs,
    TopToken,
)
from model_worker.engine.sampling_params import SamplingParams
from registry.errors import ContextLengthError, InternalError, RootgraftError
from tests.fakes.fake_loras import FakeLoras

Reply = Callable[[Sequence[int]], Sequence[int]]


def echo(prompt_token_ids: Sequence[int]) -> Sequence[int]:
    return prompt_token_ids


class FakeEngine:
    """Gives `reply(prompt)` one token a step. Stop strings are not looked for; that is the real engine's work.

    Attributes:
        gate: while it is cleared, no request gets its next token.
        requests: the accepted requests, in order: (request id, prompt, sampling).
        requested_loras: the adapters of each of them.
        running, aborted: ids of requests that run, and of those that were closed before their end.
        refuse_with: refuse requests so.
        fail_after: end each request with this error after so many tokens.
        num_steps: grows only by the test's hand.
    """

    def __init__(self, tokenizer: Tokenizer, *, max_model_len: int = 256, reply: Reply = echo) -> None:
        self.tokenizer = tokenizer
        self.max_model_len = max_model_len
        self.failed: BaseException | None = None
        self.reply = reply
        self.gate = asyncio.Event()
        self.gate.set()
        self.requests: list[tuple[str, list[int], SamplingParams]] = []
        self.requested_loras: list[tuple[LoraWeight, ...]] = []
        self.requested_tokenizers: list[Tokenizer | None] = []
        self.loras = FakeLoras()
        self.running: set[str] = set()
        self.aborted: list[str] = []
        self.refuse_with: RootgraftError | None = None
        self.fail_after: tuple[int, RootgraftError] | None = None
        self.started = False
        self.num_steps = 0
        self._died = asyncio.Event()
        self._stats = EngineStats(**{field.name: 0 for field in fields(EngineStats)} | {"kv_blocks_total": 64})

    async def start(self) -> None:
        self.started = True

    async def stop(self) -> None:
        self.started = False

    def die(self, cause: BaseException) -> None:
        """What a bug in the engine thread does: every request fails."""
        self.failed = cause
        self._died.set()
        self.gate.set()

    def stats(self) -> EngineStats:
        return replace(self._stats, num_running=len(self.running), cancelled_total=len(self.aborted))

    async def generate(
        self,
        request_id: str,
        prompt_token_ids: list[int],
        sampling: SamplingParams,
        *,
        loras: Sequence[LoraWeight] = (),
        tokenizer: Tokenizer | None = None,
    ) -> AsyncGenerator[RequestOutput, None]:
        self._check(prompt_token_ids)
        assert request_id not in self.running
        self.requests.append((request_id, prompt_token_ids, sampling))
        self.requested_loras.append(tuple(loras))
        self.requested_tokenizers.append(tokenizer)
        self.running.add(request_id)
        ended = False
        try:
            token_ids = list(self.reply(prompt_token_ids))
            limit = sampling.max_tokens or self.max_model_len - len(prompt_token_ids)
            reason = FinishReason.LENGTH if len(token_ids) >= limit else FinishReason.STOP
            token_ids = token_ids[:limit]
            for position, token_id in enumerate(token_ids):
                await self.gate.wait()
                if self._died.is_set():
                    raise InternalError("The engine of this model worker has failed; see its log.")
                if self.fail_after is not None and self.fail_after[0] == position:
                    ended = True
                    yield RequestOutput(request_id, len(prompt_token_ids), 0, finished=True, error=self.fail_after[1])
                    return
                last = position == len(token_ids) - 1
                ended = last
                yield self._output(request_id, prompt_token_ids, sampling, position, token_id, reason if last else None)
                await asyncio.sleep(0)
        finally:
            self.running.discard(request_id)
            if not ended:
                self.aborted.append(request_id)

    def _check(self, prompt_token_ids: list[int]) -> None:
        if self._died.is_set():
            raise InternalError("The engine of this model worker has failed; see its log.")
        if self.refuse_with is not None:
            raise self.refuse_with
        if len(prompt_token_ids) >= self.max_model_len:
            raise ContextLengthError(
                f"This model's context is {self.max_model_len} tokens; the request has {len(prompt_token_ids)}.",
                param="prompt",
            )

    def _output(
        self,
        request_id: str,
        prompt_token_ids: list[int],
        sampling: SamplingParams,
        position: int,
        token_id: int,
        reason: FinishReason | None,
    ) -> RequestOutput:
        prompt_logprobs = None
        if position == 0 and sampling.prompt_logprobs is not None:
            prompt_logprobs = (None, *(_logprobs(i, sampling.prompt_logprobs) for i in prompt_token_ids[1:]))
        logprobs = None if sampling.logprobs is None else (_logprobs(token_id, sampling.logprobs),)
        text = self.tokenizer.decode([token_id])
        return RequestOutput(
            request_id=request_id,
            num_prompt_tokens=len(prompt_token_ids),
            num_cached_tokens=0,
            deltas=tuple(
                SequenceDelta(index, text, (token_id,), logprobs, finish_reason=reason) for index in range(sampling.n)
            ),
            prompt_logprobs=prompt_logprobs,
            finished=reason is not None,
        )


def _logprobs(token_id: int, num_top: int) -> TokenLogprobs:
    """The token itself first, then ids from 0 up, each half as probable."""
    ids = [token_id, *(i for i in range(num_top) if i != token_id)][:num_top]
    return TokenLogprobs(token_id, -0.5, tuple(TopToken(i, -0.5 * (rank + 1)) for rank, i in enumerate(ids)))

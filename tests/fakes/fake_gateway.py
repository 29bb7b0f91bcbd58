"""A gateway without workers: it answers with the events of a script, and remembers what it was asked."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from dataclasses import dataclass, field

from controller.config import LimitsConfig
from controller.key_rules import KeyRules
from controller.metrics import Metrics
from controller.openai.backend import Event
from controller.protocol import (
    ChatPrompt,
    DeltaEvent,
    DetokenizeReply,
    DetokenizeRequest,
    DoneEvent,
    GenerateRequest,
    Prompt,
    PromptEvent,
    TextPrompt,
    TokenizeReply,
    TokenizeRequest,
    TokenLogprob,
    TopLogprob,
)
from registry.errors import ModelNotFoundError, RootgraftError

Script = Iterable[Event | Exception | asyncio.Event]


@dataclass(frozen=True, slots=True)
class FakeModel:
    name: str
    max_model_len: int = 2048
    created: int = 1_700_000_000
    parent: str | None = None

    @property
    def root(self) -> str:
        return f"/adapters/{self.name}" if self.parent else self.name


def text_of(prompt: Prompt) -> str:
    """The text of a prompt whose tokens are UTF-8 bytes and whose chat template is `role: content` lines."""
    if isinstance(prompt, TextPrompt):
        return prompt.text
    if isinstance(prompt, ChatPrompt):
        return "\n".join(f"{message.role}: {message.content}" for message in prompt.messages)
    return bytes(token_id % 256 for token_id in prompt.token_ids).decode(errors="replace")


def token(text: str, num_top: int) -> TokenLogprob:
    """A token with `text`, of logprob -0.5, and the `num_top` best ones: itself and made-up ones."""
    token_id, content = sum(text.encode()), list(text.encode())
    others = [
        TopLogprob(token=f"t{rank}", token_id=1000 + rank, logprob=-0.5 - rank, bytes=[116, 48 + rank % 10])
        for rank in range(1, num_top)
    ]
    itself = TopLogprob(token=text, token_id=token_id, logprob=-0.5, bytes=content)
    return TokenLogprob(
        token=text, token_id=token_id, logprob=-0.5, bytes=content, top=[itself, *others][: max(num_top, 0)]
    )


def reply_events(request: GenerateRequest, pieces: Sequence[str]) -> list[Event]:
    """What a worker sends that samples `pieces`, a token each, for every choice, with what `request` asks for."""
    sampling, text = request.sampling, text_of(request.prompt)
    prompt = PromptEvent(num_prompt_tokens=len(text.encode()), prompt_text=text if request.return_prompt_text else None)
    if sampling.prompt_logprobs is not None:
        num_top = sampling.prompt_logprobs
        prompt = prompt.model_copy(
            update={
                "prompt_token_strs": list(text),
                "prompt_logprobs": [None, *(token(char, num_top) for char in text[1:])],
            }
        )
    events: list[Event] = [prompt]
    kept = pieces if sampling.max_tokens is None else pieces[: sampling.max_tokens]
    for position, piece in enumerate(kept):
        last = position == len(kept) - 1
        events += [
            DeltaEvent(
                index=index,
                text=piece,
                num_tokens=1,
                logprobs=None if sampling.logprobs is None else [token(piece, sampling.logprobs)],
                finish_reason=None if not last else "stop" if len(kept) == len(pieces) else "length",
                stop_reason=7 if last and len(kept) == len(pieces) else None,
            )
            for index in range(sampling.n)
        ]
    return [
        *events,
        DoneEvent(
            num_prompt_tokens=prompt.num_prompt_tokens,
            num_cached_tokens=prompt.num_prompt_tokens // 2,
            num_completion_tokens=len(kept) * sampling.n,
        ),
    ]


@dataclass
class FakeGateway:
    """Attributes:
    models_: what is served; other names raise ModelNotFoundError.
    pieces: the tokens of every answer.
    script: makes the events of a request in place of `pieces`; exceptions in it are raised, asyncio.Events awaited.
    refuse: raised by every request before its first event.
    pause: whether the events come one by one, and the event loop runs between two of them; else they come together.
    requests, affinities: what came, in order.
    num_open: streams that have begun and not ended; num_closed_early: those closed before their terminal event.
    """

    models_: list[FakeModel] = field(default_factory=lambda: [FakeModel("org/tiny")])
    pieces: Sequence[str] = ("Hello", ", ", "wörld", " \U0001f600")
    script: Callable[[GenerateRequest], Script] | None = None
    refuse: RootgraftError | None = None
    pause: bool = True
    requests: list[GenerateRequest] = field(default_factory=list)
    affinities: list[str | None] = field(default_factory=list)
    tokenize_requests: list[TokenizeRequest] = field(default_factory=list)
    num_refused: int = 0
    num_open: int = 0
    num_closed_early: int = 0

    async def stream(
        self, request: GenerateRequest, *, affinity: str | None = None, sticky: str | None = None
    ) -> AsyncGenerator[list[Event], None]:
        self._check(request.model)
        self.requests.append(request)
        self.affinities.append(affinity)
        self.num_open += 1
        ended = False
        together: list[Event] = []
        try:
            for event in self.script(request) if self.script else reply_events(request, self.pieces):
                if self.pause:
                    await asyncio.sleep(0)
                if isinstance(event, Exception | asyncio.Event):
                    if together:
                        yield together
                        together = []
                    if isinstance(event, Exception):
                        ended = True
                        raise event
                    await event.wait()
                    continue
                together.append(event)
                ended = event.kind in ("done", "error")
                if self.pause or ended:
                    yield together
                    together = []
            if together:
                yield together
            ended = True
        finally:
            self.num_open -= 1
            self.num_closed_early += not ended

    async def tokenize(self, request: TokenizeRequest) -> TokenizeReply:
        self._check(request.model)
        self.tokenize_requests.append(request)
        text = text_of(request.prompt)
        return TokenizeReply(
            token_ids=list(text.encode()),
            token_strs=list(text) if request.return_token_strs else None,
            max_model_len=2048,
        )

    async def detokenize(self, request: DetokenizeRequest) -> DetokenizeReply:
        self._check(request.model)
        return DetokenizeReply(text=bytes(i % 256 for i in request.token_ids).decode(errors="replace"))

    def models(self) -> list[FakeModel]:
        return self.models_

    def model(self, name: str) -> FakeModel | None:
        return next((model for model in self.models_ if model.name == name), None)

    def _check(self, model: str) -> None:
        if self.refuse is not None:
            self.num_refused += 1
            raise self.refuse
        if model not in [served.name for served in self.models_]:
            raise ModelNotFoundError(f"No model {model!r} is served.", param="model")


@dataclass(slots=True)
class FakeBackend:
    """What the OpenAI routes need of a ControllerState; replace its parts to begin anew under the same app."""

    gateway: FakeGateway = field(default_factory=FakeGateway)
    metrics: Metrics = field(default_factory=Metrics)
    key_rules: KeyRules = field(
        default_factory=lambda: KeyRules(LimitsConfig(max_lora_combinations_per_key=10**6), time.monotonic)
    )

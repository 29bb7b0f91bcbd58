"""One HTTP request as generate requests, one for each prompt, and their events gathered into whole choices."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field

from controller.metrics import RequestObserver
from controller.openai.backend import ModelGateway
from controller.openai.event_source import Batch, EventSource
from controller.openai.merged_events import MergedEvents
from controller.openai.schemas_responses import Usage
from controller.openai.single_events import SingleEvents
from controller.protocol import (
    ChatPrompt,
    FinishReason,
    GenerateRequest,
    LoraWeight,
    Prompt,
    PromptEvent,
    Sampling,
    TextPrompt,
    TokenLogprob,
)
from registry.errors import InternalError

AFFINITY_CHARS = 512  # of a prompt, that requests must share to be sent to the same replica
AFFINITY_TOKENS = 128


@dataclass(frozen=True, slots=True)
class Identity:
    """What every object and chunk of one answer repeats."""

    id: str
    created: int  # Unix time, seconds
    model: str  # as the client wrote it

    @classmethod
    def new(cls, prefix: str, model: str) -> Identity:
        return cls(id=f"{prefix}-{uuid.uuid4().hex}", created=int(time.time()), model=model)


@dataclass(slots=True)
class UsageCount:
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0

    def to_json(self) -> Usage:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


@dataclass(slots=True)
class ChoiceText:
    """What one choice has gained: all of it, or its part of a batch."""

    texts: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None

    @property
    def finished(self) -> FinishReason:
        """The finish reason of a choice that has ended."""
        if self.finish_reason is None:
            raise InternalError("A choice has no end; send the request again.")
        return self.finish_reason


class Generation:
    """The answer to one request while it is made.

    Args:
        prompts: each is generated for `sampling.n` times; choice `i` of prompt `p` has the index `p * n + i`.
        loras: the adapters of the model that are asked for beside it.
        affinity_key: what the client says its requests have in common; by default it is guessed from the prompt.
        sticky: who asks, as far as it is known: the same get the same version of a release.
    """

    def __init__(
        self,
        gateway: ModelGateway,
        observer: RequestObserver,
        identity: Identity,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        *,
        loras: Sequence[LoraWeight] = (),
        return_prompt_text: bool = False,
        affinity_key: str | None = None,
        sticky: str | None = None,
    ) -> None:
        self.identity = identity
        self.num_choices = len(prompts) * sampling.n
        self.usage = UsageCount()
        self.prompts: dict[int, PromptEvent] = {}  # prompt index → its event
        self._gateway = gateway
        self._observer = observer
        self._prompts = prompts
        self._sampling = sampling
        self._loras = list(loras)
        self._return_prompt_text = return_prompt_text
        self._affinity_key = affinity_key
        self._sticky = sticky

    @property
    def fingerprint(self) -> str | None:
        """Of the weights that answer the first prompt that has begun; None before that, and where it is not known."""
        return next((prompt.fingerprint for prompt in self.prompts.values()), None)

    def prompt_of_choice(self, choice: int) -> PromptEvent:
        return self.prompts[choice // self._sampling.n]

    def events(self) -> EventSource:
        """Send the prompts, each as a request of its own."""
        streams = [
            self._gateway.stream(
                GenerateRequest(
                    request_id=f"{self.identity.id}-{index}",
                    model=self.identity.model,
                    loras=self._loras,
                    prompt=prompt,
                    sampling=self._sampling,
                    return_prompt_text=self._return_prompt_text,
                ),
                affinity=self._affinity_key or _affinity(prompt),
                sticky=self._sticky,
            )
            for index, prompt in enumerate(self._prompts)
        ]
        return SingleEvents(streams[0]) if len(streams) == 1 else MergedEvents(streams)

    def accept(self) -> None:
        """The gateway has taken the request, so its model exists."""
        self._observer.set_model(self.identity.model)

    def gained(self, batch: Batch) -> dict[int, ChoiceText]:
        """Count a batch, and give what each choice gained by it, in the order of arrival."""
        gains: dict[int, ChoiceText] = {}
        for prompt_index, event in batch:
            if event.kind == "delta":
                choice = prompt_index * self._sampling.n + event.index
                gain = gains.setdefault(choice, ChoiceText())
                gain.texts.append(event.text)
                if event.logprobs:
                    gain.logprobs += event.logprobs
                if event.finish_reason is not None:
                    gain.finish_reason = event.finish_reason
                    gain.stop_reason = event.stop_reason
                self._observer.delta(choice, event.num_tokens)
            elif event.kind == "prompt":
                self.prompts[prompt_index] = event
            else:
                self.usage.prompt_tokens += event.num_prompt_tokens
                self.usage.cached_tokens += event.num_cached_tokens
                self.usage.completion_tokens += event.num_completion_tokens
                self._observer.done(event.num_prompt_tokens)
        return gains

    async def collect(self) -> list[ChoiceText]:
        """Wait for the end, and give every choice as a whole.

        Raises:
            RootgraftError: the request was refused, or failed on its way.
        """
        choices = [ChoiceText() for _ in range(self.num_choices)]
        async with self.events() as events:
            await events.accepted()
            self.accept()
            async for batch in events:
                for index, gain in self.gained(batch).items():
                    choice = choices[index]
                    choice.texts += gain.texts
                    choice.logprobs += gain.logprobs
                    choice.finish_reason = gain.finish_reason or choice.finish_reason
                    choice.stop_reason = gain.stop_reason if choice.stop_reason is None else choice.stop_reason
        return choices


def _affinity(prompt: Prompt) -> str:
    """Equal for requests that are likely to share a prefix: turns of one conversation, texts with one beginning."""
    if isinstance(prompt, ChatPrompt):
        return "\0".join(f"{message.role}:{message.content[:AFFINITY_CHARS]}" for message in prompt.messages[:2])
    if isinstance(prompt, TextPrompt):
        return prompt.text[:AFFINITY_CHARS]
    return ",".join(map(str, prompt.token_ids[:AFFINITY_TOKENS]))

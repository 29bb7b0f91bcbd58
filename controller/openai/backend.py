"""What these routes need of the rest of the controller; controller.state.ControllerState has it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from typing import Protocol

from controller.key_rules import KeyRules
from controller.metrics import Metrics
from controller.protocol import (
    DeltaEvent,
    DetokenizeReply,
    DetokenizeRequest,
    DoneEvent,
    ErrorEvent,
    GenerateRequest,
    PromptEvent,
    TokenizeReply,
    TokenizeRequest,
)

Event = PromptEvent | DeltaEvent | DoneEvent | ErrorEvent


class LiveModel(Protocol):
    """A model or variant that can be asked now; `created` is Unix time in seconds, `parent` a variant's base model."""

    @property
    def name(self) -> str: ...
    @property
    def root(self) -> str: ...
    @property
    def parent(self) -> str | None: ...
    @property
    def max_model_len(self) -> int: ...
    @property
    def created(self) -> int: ...


class ModelGateway(Protocol):
    """See controller.publishing.gateway.ReleaseGateway."""

    def stream(
        self, request: GenerateRequest, *, affinity: str | None = None, sticky: str | None = None
    ) -> AsyncGenerator[list[Event], None]: ...
    async def tokenize(self, request: TokenizeRequest) -> TokenizeReply: ...
    async def detokenize(self, request: DetokenizeRequest) -> DetokenizeReply: ...
    def models(self) -> Sequence[LiveModel]: ...
    def model(self, name: str) -> LiveModel | None: ...


class Backend(Protocol):
    @property
    def gateway(self) -> ModelGateway: ...
    @property
    def metrics(self) -> Metrics: ...
    @property
    def key_rules(self) -> KeyRules: ...

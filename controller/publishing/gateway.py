"""The gateway that the public API speaks to: names of releases become versions, canaries and shadows get their share.

request ──► assignment of its name ──► version for whoever asks ──► controller.gateway, as the variant name@vN
                                             │ canary that fails before its first event: the stable version
                                             └─► shadow, beside it

What is no name of a release passes unchanged.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from dataclasses import replace

from controller.gateway import Gateway
from controller.protocol import (
    ChatPrompt,
    DetokenizeReply,
    DetokenizeRequest,
    GenerateRequest,
    LoraWeight,
    Prompt,
    TextPrompt,
    TokenizeReply,
    TokenizeRequest,
)
from controller.publishing.canaries import CanaryJudge
from controller.publishing.release_counts import Outcome, ReleaseCounts, Role
from controller.publishing.release_directory import Assignment, ReleaseDirectory
from controller.publishing.shadows import Answer, Shadows
from controller.served_names import ServedModelInfo
from controller.worker_client import GenerateEvents
from registry.catalog import DEFAULT_ALIAS
from registry.errors import ClientError, ModelNotFoundError, RootgraftError, ServerError, error_from_code
from registry.names import is_name

logger = logging.getLogger(__name__)

STICKY_CHARS = 2048  # of a conversation's beginning
STICKY_TOKENS = 256


class ReleaseGateway:
    """A `controller.openai.backend.ModelGateway`."""

    def __init__(
        self, inner: Gateway, directory: ReleaseDirectory, canaries: CanaryJudge, counts: ReleaseCounts
    ) -> None:
        self._inner = inner
        self._directory = directory
        self._canaries = canaries
        self._counts = counts
        self.shadows = Shadows(inner.stream, counts)

    def stream(
        self, request: GenerateRequest, *, affinity: str | None = None, sticky: str | None = None
    ) -> AsyncGenerator[list[GenerateEvents], None]:
        """As Gateway.stream.

        Args:
            sticky: who asks; the same get the same version. None: whoever has begun the conversation so.
        """
        assignment = self._directory.assignment(request.model)
        if assignment is None:
            return self._inner.stream(self._with_versions(request), affinity=affinity)
        return self._stream(request, assignment, affinity, sticky or conversation_start(request.prompt))

    async def tokenize(self, request: TokenizeRequest) -> TokenizeReply:
        """As Gateway.tokenize; of a release, its stable version's."""
        return await self._inner.tokenize(request.model_copy(update={"model": self._stable(request.model)}))

    async def detokenize(self, request: DetokenizeRequest) -> DetokenizeReply:
        """As Gateway.detokenize; of a release, its stable version's."""
        return await self._inner.detokenize(request.model_copy(update={"model": self._stable(request.model)}))

    def models(self) -> list[ServedModelInfo]:
        """As Gateway.models, but releases and their aliases stand in the place of their versions."""
        return list(self._with_releases(self._inner.models()))

    def model(self, name: str) -> ServedModelInfo | None:
        """What `name` stands for, if it can be asked for now: versions and "@prod" too, which `models` leaves out."""
        served = self._inner.models()
        for model in self._with_releases(served):
            if model.name == name:
                return model
        stable = self._stable(name)
        version = next((model for model in served if model.name == stable), None)
        return version if version is None or name == stable else replace(version, name=name, root=stable)

    # -------------------------------------------------------------------------------------------------- streams

    async def _stream(
        self, request: GenerateRequest, assignment: Assignment, affinity: str | None, sticky: str
    ) -> AsyncGenerator[list[GenerateEvents], None]:
        chosen = assignment.choose(sticky)
        if chosen != assignment.stable:
            async with aclosing(self._counted(request, assignment, chosen, "canary", affinity)) as events:
                try:
                    first = await anext(events)
                except (ServerError, ModelNotFoundError) as error:
                    logger.warning("the canary %s gave way: %s", assignment.name_of(chosen), error.message)
                else:
                    yield first
                    async for more in events:
                        yield more
                    return
        async with aclosing(self._counted(request, assignment, assignment.stable, "stable", affinity)) as events:
            async for more in events:
                yield more

    async def _counted(
        self, request: GenerateRequest, assignment: Assignment, version: int, role: Role, affinity: str | None
    ) -> AsyncGenerator[list[GenerateEvents], None]:
        answer = Answer()
        ended = None
        outcome: Outcome = "cancelled"
        if role == "stable" and assignment.shadow is not None:
            ended = self.shadows.begin(request, assignment.release, assignment.shadow, answer)
        asked = request.model_copy(update={"model": assignment.name_of(version)})
        try:
            async with aclosing(self._inner.stream(asked, affinity=affinity)) as stream:
                async for events in stream:
                    answer.take(events)
                    if events[-1].kind == "done":
                        outcome = "ok"
                    elif events[-1].kind == "error":
                        outcome = _outcome_of(error_from_code(events[-1].code, events[-1].message))
                    yield events
        except RootgraftError as error:
            outcome = _outcome_of(error)
            raise
        finally:
            if ended is not None:
                ended.set()
            self._note(assignment, version, role, outcome, answer.num_tokens)

    def _note(self, assignment: Assignment, version: int, role: Role, outcome: Outcome, num_tokens: int) -> None:
        release = assignment.release
        self._counts.requests[release, version, role, outcome] += 1
        self._counts.tokens[release, version, role] += num_tokens
        if assignment.canary is not None and assignment.alias is not None and outcome in ("ok", "failed"):
            self._canaries.note(release, assignment.alias, version, failed=outcome == "failed")

    # ---------------------------------------------------------------------------------------------------- names

    def _stable(self, name: str) -> str:
        assignment = self._directory.assignment(name)
        return name if assignment is None else assignment.name_of(assignment.stable)

    def _with_versions(self, request: GenerateRequest) -> GenerateRequest:
        """Releases among the adapters of a request are their stable versions."""
        if not request.loras:
            return request
        loras = [LoraWeight(name=self._stable(lora.name), scale=lora.scale) for lora in request.loras]
        return request.model_copy(update={"loras": loras})

    def _with_releases(self, models: Sequence[ServedModelInfo]) -> Iterator[ServedModelInfo]:
        served = {model.name: model for model in models}
        aliases = sorted(self._directory.aliases(), key=lambda alias: (alias.name, alias.alias))
        for model in models:
            if is_name(model.name):
                yield model
            if model.parent is not None:
                continue
            for alias in aliases:
                version = served.get(str(alias.target))
                if version is not None and version.parent == model.name and alias.target.version is not None:
                    name = alias.name if alias.alias == DEFAULT_ALIAS else f"{alias.name}@{alias.alias}"
                    yield replace(version, name=name, root=version.name)


def conversation_start(prompt: Prompt) -> str:
    """The same for all turns of one conversation."""
    if isinstance(prompt, ChatPrompt):
        parts: list[str] = []
        for message in prompt.messages:
            parts.append(f"{message.role}:{message.content[:STICKY_CHARS]}")
            if message.role == "user":
                break
        return "\0".join(parts)
    if isinstance(prompt, TextPrompt):
        return prompt.text[:STICKY_CHARS]
    return ",".join(map(str, prompt.token_ids[:STICKY_TOKENS]))


def _outcome_of(error: RootgraftError) -> Outcome:
    """A version that nobody can serve is our fault, although its name is not found on a worker."""
    return "refused" if isinstance(error, ClientError) and not isinstance(error, ModelNotFoundError) else "failed"

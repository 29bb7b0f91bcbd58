"""What the chat page does, without its layout."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass

from webui.answer import Answer
from webui.client import ApiClient, ApiError, SamplingOptions
from webui.conversation import Conversation, answer, for_request, notice


@dataclass(frozen=True, slots=True)
class Serving:
    """What the controller serves, as last seen: its models, or why they are not known."""

    models: tuple[str, ...] = ()
    error: str | None = None


class Chat:
    """Answers of all browser tabs; at most one runs in each tab."""

    def __init__(self, client: ApiClient, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._client = client
        self._clock = clock
        self._running: dict[str, Answer] = {}

    async def serving(self) -> Serving:
        try:
            return Serving(models=tuple(await self._client.list_models()))
        except ApiError as error:
            return Serving(error=str(error))

    async def answer(
        self, tab: str, conversation: Conversation, model: str | None, system_prompt: str, options: SamplingOptions
    ) -> AsyncGenerator[tuple[Conversation, str], None]:
        """The conversation with its answer as that grows, and a line about its speed.

        A failure becomes a notice in the conversation; what had come before it stays.
        """
        if not model:
            yield notice(conversation, "No model is chosen. Choose one in the list at the left."), ""
            return
        self.stop(tab)
        messages = for_request(conversation, system_prompt)
        async with Answer(self._client, model, messages, options, clock=self._clock) as running:
            self._running[tab] = running
            try:
                async with aclosing(running.changes()) as changes:
                    async for _ in changes:
                        if running.forgotten:
                            yield [], ""
                            return
                        yield self._shown(conversation, running), running.measurement.summary()
            finally:
                if self._running.get(tab) is running:
                    del self._running[tab]

    def stop(self, tab: str) -> None:
        """End the tab's answer, if one runs."""
        if running := self._running.get(tab):
            running.stop()

    def forget(self, tab: str) -> None:
        """End the tab's answer, if one runs, and leave an empty conversation."""
        if running := self._running.get(tab):
            running.forgotten = True
            running.stop()

    def _shown(self, conversation: Conversation, running: Answer) -> Conversation:
        shown = answer(conversation, running.text) if running.text else conversation
        if running.error is not None:
            return notice(shown, running.error)
        if running.stopped and not running.text:
            return notice(shown, "Stopped before the first token.")
        return shown

"""Shadows: a version is asked what clients ask of another one; its answers are compared and dropped."""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import aclosing

from controller.protocol import GenerateRequest
from controller.publishing.release_counts import Comparison, ReleaseCounts
from controller.worker_client import GenerateEvents
from registry.errors import RootgraftError

logger = logging.getLogger(__name__)

MAX_SHADOWS = 32  # requests of shadows in progress; more are not sent
PRIORITY = 1000  # in the workers' queues: after everybody else

Ask = Callable[[GenerateRequest], AsyncGenerator[list[GenerateEvents], None]]


class Answer:
    """The text of each choice, as it comes."""

    def __init__(self) -> None:
        self._pieces: defaultdict[int, list[str]] = defaultdict(list)
        self.num_tokens = 0
        self.complete = False

    def take(self, events: Iterable[GenerateEvents]) -> None:
        for event in events:
            if event.kind == "delta":
                self._pieces[event.index].append(event.text)
                self.num_tokens += event.num_tokens
            elif event.kind == "done":
                self.complete = True

    def texts(self) -> dict[int, str]:
        return {index: "".join(pieces) for index, pieces in self._pieces.items()}


class Shadows:
    """Nothing that goes wrong here reaches a client, and no client waits for it.

    Args:
        ask: sends a request to what its model names.
    """

    def __init__(self, ask: Ask, counts: ReleaseCounts) -> None:
        self._ask = ask
        self._counts = counts
        self._tasks: set[asyncio.Task[None]] = set()

    def begin(self, request: GenerateRequest, release: str, version: int, answer: Answer) -> asyncio.Event:
        """Ask the version the same. -> to be set when `answer`, what the client got, has ended"""
        ended = asyncio.Event()
        if len(self._tasks) >= MAX_SHADOWS:
            self._counts.shadows[release, version, "skipped"] += 1
            return ended
        asked = request.model_copy(
            update={
                "request_id": f"{request.request_id}-shadow",
                "model": f"{release}@v{version}",
                "sampling": request.sampling.model_copy(update={"priority": PRIORITY}),
            }
        )
        task = asyncio.create_task(self._compare(asked, release, version, answer, ended), name="shadow")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return ended

    async def stop(self) -> None:
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _compare(
        self, request: GenerateRequest, release: str, version: int, answer: Answer, ended: asyncio.Event
    ) -> None:
        own = Answer()
        try:
            async with aclosing(self._ask(request)) as stream:
                async for events in stream:
                    own.take(events)
        except RootgraftError as error:
            logger.info("the shadow %s did not answer: %s", request.model, error.message)
        except Exception:  # whatever becomes of a shadow, its client must not notice
            logger.exception("the shadow %s failed", request.model)
        await ended.wait()
        if not answer.complete:
            return  # the client went away, or got an error: there is nothing to compare with
        self._counts.shadows[release, version, _comparison(request, answer, own)] += 1
        self._counts.tokens[release, version, "shadow"] += own.num_tokens


def _comparison(request: GenerateRequest, answer: Answer, own: Answer) -> Comparison:
    if not own.complete:
        return "failed"
    if request.sampling.temperature > 0.0 and request.sampling.seed is None:
        return "sampled"
    return "agrees" if own.texts() == answer.texts() else "differs"

"""Brings what the engine says to whoever waits for it, in the event loop's thread."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import cast

from model_worker.engine.outputs import RequestOutput, SequenceDelta
from registry.errors import RootgraftError

News = RequestOutput | RootgraftError
"""What a step gave to one request, or why it gets nothing any more."""


class Mailbox:
    """The news of one request that its only reader has not taken yet."""

    __slots__ = ("_news", "_reader")

    def __init__(self) -> None:
        self._news: list[News] = []
        self._reader: asyncio.Future[None] | None = None

    def put(self, news: News) -> None:
        self._news.append(news)
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    async def take(self) -> list[News]:
        """All there is, at least one, outputs joined: a reader that is behind catches up with one output."""
        if not self._news:
            self._reader = asyncio.get_running_loop().create_future()
            try:
                await self._reader
            finally:
                self._reader = None
        news, self._news = self._news, []
        return news if len(news) == 1 else joined(news)


class RequestTracker:
    """The mailboxes of the open requests."""

    def __init__(self) -> None:
        self._mailboxes: dict[str, Mailbox] = {}

    def open(self, request_id: str) -> Mailbox:
        assert request_id not in self._mailboxes
        mailbox = self._mailboxes[request_id] = Mailbox()
        return mailbox

    def close(self, request_id: str) -> None:
        del self._mailboxes[request_id]

    def deliver(self, news: Sequence[tuple[str, News]]) -> None:
        for request_id, item in news:
            mailbox = self._mailboxes.get(request_id)
            if mailbox is not None:  # else its reader has gone, and its abort is on the way
                mailbox.put(item)

    def fail_all(self, error: RootgraftError) -> None:
        for mailbox in self._mailboxes.values():
            mailbox.put(error)


def joined(news: Sequence[News]) -> list[News]:
    """The same news in fewer items: consecutive outputs become one, with one delta for each sequence.

    Failures stay as they are, outputs with an error too.
    """
    result: list[News] = []
    for are_outputs, group in itertools.groupby(news, _is_plain_output):
        run = list(group)
        result += [_joined_outputs(cast("list[RequestOutput]", run))] if are_outputs else run
    return result


def _is_plain_output(news: News) -> bool:
    return isinstance(news, RequestOutput) and news.error is None


def _joined_outputs(outputs: Sequence[RequestOutput]) -> RequestOutput:
    of_index: dict[int, list[SequenceDelta]] = {}
    for output in outputs:
        for delta in output.deltas:
            of_index.setdefault(delta.index, []).append(delta)
    prompt_logprobs = [output.prompt_logprobs for output in outputs if output.prompt_logprobs is not None]
    return replace(
        outputs[-1],
        deltas=tuple(_joined_deltas(deltas) for deltas in of_index.values()),
        prompt_logprobs=prompt_logprobs[0] if prompt_logprobs else None,
    )


def _joined_deltas(deltas: Sequence[SequenceDelta]) -> SequenceDelta:
    last = deltas[-1]
    return replace(
        last,
        text="".join([delta.text for delta in deltas]),
        token_ids=tuple(token_id for delta in deltas for token_id in delta.token_ids),
        logprobs=None if last.logprobs is None else tuple(one for delta in deltas for one in delta.logprobs or ()),
    )

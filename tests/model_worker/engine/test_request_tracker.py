from __future__ import annotations

import asyncio

from model_worker.engine.outputs import FinishReason, RequestOutput, SequenceDelta, TokenLogprobs
from model_worker.engine.request_tracker import Mailbox, RequestTracker, joined
from registry.errors import InternalError


def output(*deltas: SequenceDelta, finished: bool = False, **fields: object) -> RequestOutput:
    return RequestOutput("r", 3, 1, deltas, finished=finished, **fields)  # type: ignore[arg-type]


def delta(index: int, text: str, token_id: int, **fields: object) -> SequenceDelta:
    return SequenceDelta(index, text, (token_id,), **{"logprobs": None, **fields})  # type: ignore[arg-type]


async def test_a_reader_gets_what_comes_and_what_waits() -> None:
    mailbox = Mailbox()
    first, second = output(delta(0, "a", 1)), output(delta(0, "b", 2))
    taking = asyncio.create_task(mailbox.take())
    await asyncio.sleep(0)
    mailbox.put(first)
    assert await taking == [first]
    mailbox.put(first)
    mailbox.put(second)
    assert await mailbox.take() == [output(SequenceDelta(0, "ab", (1, 2), None))]


async def test_a_reader_that_gave_up_loses_nothing() -> None:
    mailbox = Mailbox()
    taking = asyncio.create_task(mailbox.take())
    await asyncio.sleep(0)
    taking.cancel()
    mailbox.put(output())
    assert (await asyncio.gather(taking, return_exceptions=True)) != [[output()]]
    assert await mailbox.take() == [output()]


async def test_news_of_a_closed_request_are_dropped() -> None:
    tracker = RequestTracker()
    mailbox = tracker.open("r")
    tracker.open("gone")
    tracker.close("gone")
    tracker.deliver([("gone", output()), ("r", output(finished=True))])
    assert await mailbox.take() == [output(finished=True)]


def test_the_deltas_of_each_sequence_are_joined_with_their_logprobs_and_the_last_ones_end() -> None:
    logprobs = [TokenLogprobs(token_id, -1.0, ()) for token_id in range(3)]
    prompt_logprobs = (None, logprobs[0])
    news = [
        output(delta(0, "a", 0, logprobs=(logprobs[0],)), delta(1, "x", 9), prompt_logprobs=prompt_logprobs),
        output(delta(0, "", 1, logprobs=(logprobs[1],))),
        output(
            delta(0, "c", 2, logprobs=(logprobs[2],), finish_reason=FinishReason.STOP, stop_reason="END"), finished=True
        ),
    ]
    assert joined(news) == [
        output(
            SequenceDelta(0, "ac", (0, 1, 2), tuple(logprobs), FinishReason.STOP, "END"),
            delta(1, "x", 9),
            prompt_logprobs=prompt_logprobs,
            finished=True,
        )
    ]


def test_failures_keep_their_place() -> None:
    failed = output(finished=True, error=InternalError("broken"))
    error = InternalError("the engine died")
    assert joined([output(delta(0, "a", 1)), output(delta(0, "b", 2)), failed]) == [
        output(SequenceDelta(0, "ab", (1, 2), None)),
        failed,
    ]
    assert joined([output(delta(0, "a", 1)), error]) == [output(delta(0, "a", 1)), error]

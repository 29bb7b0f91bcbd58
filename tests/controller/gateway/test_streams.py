"""The way of a request to a worker and of its events back."""

from __future__ import annotations

import asyncio

import pytest

from controller.protocol import (
    DeltaEvent,
    DetokenizeRequest,
    ErrorEvent,
    PromptEvent,
    ServedModel,
    TextPrompt,
    TokenizeRequest,
    WorkerStats,
)
from registry.errors import (
    ContextLengthError,
    ModelNotFoundError,
    OverloadedError,
    RateLimitError,
    UpstreamError,
)
from tests.fakes.fake_worker import Script
from tests.fakes.gateway_fleet import Fleet, Start, first_events, kinds, request, text
from tests.fakes.until import until

# ------------------------------------------------------------------------------------------------- the good path


async def test_events_come_through_in_order(fleet: Fleet) -> None:
    worker = await fleet.add(Script(deltas=("a", "ö", "c")))
    events = await fleet.events()
    assert kinds(events) == ["prompt", "delta", "delta", "delta", "done"]
    assert text(events) == "aöc"
    assert worker.requests == [request()]


async def test_lines_may_come_in_any_pieces(fleet: Fleet) -> None:
    long = "x" * 300_000
    whole = "\n".join(
        (
            PromptEvent(num_prompt_tokens=1).model_dump_json(),
            "",  # a blank line says only that the worker is alive
            DeltaEvent(index=0, text="ü", num_tokens=1).model_dump_json(),
            DeltaEvent(index=0, text=long, num_tokens=1, finish_reason="stop").model_dump_json(),
            '{"kind":"done","num_prompt_tokens":1,"num_cached_tokens":0,"num_completion_tokens":2}\n',
        )
    ).encode()
    single = [whole[i : i + 1] for i in range(200)]
    await fleet.add(Script(raw=[whole]), Script(raw=[*single, whole[200:]]), Script(raw=[whole[:150], whole[150:]]))
    for _ in range(3):
        events = await fleet.events()
        assert kinds(events) == ["prompt", "delta", "delta", "done"]
        assert text(events) == "ü" + long


async def test_alias_is_resolved_before_the_worker_sees_it(fleet: Fleet) -> None:
    worker = await fleet.add()
    assert text(await fleet.events("m@prod")) == "Hello world"
    assert worker.requests[0].model == "m"


async def test_the_worker_token_is_sent(start: Start) -> None:
    fleet = await start(worker_token="secret")
    await fleet.add(token="secret")
    assert text(await fleet.events()) == "Hello world"


async def test_a_wrong_worker_token_is_not_the_clients_fault(fleet: Fleet) -> None:
    await fleet.add(token="secret")
    with pytest.raises(UpstreamError, match="token"):
        await fleet.events()


async def test_requests_in_flight_are_counted_while_the_stream_is_open(fleet: Fleet) -> None:
    await fleet.add(Script(hang_after=1))
    stream = fleet.gateway.stream(request())
    assert kinds(await anext(stream))[0] == "prompt"
    (worker,) = fleet.table
    assert worker.num_in_flight == 1
    await stream.aclose()
    assert worker.num_in_flight == 0


# --------------------------------------------------------------------------------------- before the first event


@pytest.mark.parametrize(
    "script",
    [
        Script(drop_after=-1),
        Script(refuse=ErrorEvent(code="overloaded", message="draining"), refuse_status=503),
        Script(refuse=ErrorEvent(code="rate_limit_exceeded", message="queue full"), refuse_status=429),
        Script(refuse=ErrorEvent(code="internal_error", message="bug"), refuse_status=500),
        Script(fail_first=ErrorEvent(code="overloaded", message="draining")),
        Script(raw=[b"<html>not ours</html>\n"]),
        Script(raw=[b""]),
    ],
)
async def test_a_failed_worker_is_retried_on_another(fleet: Fleet, script: Script) -> None:
    first = await fleet.add(script)
    second = await fleet.add()
    assert text(await fleet.events()) == "Hello world"
    assert (len(first.requests), len(second.requests)) == (1, 1)


async def test_a_killed_worker_is_retried_on_another_and_not_asked_again(fleet: Fleet) -> None:
    first = await fleet.add()
    await fleet.add()
    await first.kill()
    for _ in range(4):
        assert text(await fleet.events()) == "Hello world"
    assert [worker.state for worker in fleet.table] == ["suspect", "ready"]


async def test_each_worker_is_tried_once_and_at_most_max_attempts(start: Start) -> None:
    fleet = await start(max_attempts=2)
    overloaded = Script(refuse=ErrorEvent(code="overloaded", message="full", retry_after_s=7), refuse_status=503)
    workers = [await fleet.add(overloaded) for _ in range(3)]
    with pytest.raises(OverloadedError, match="full") as caught:
        await fleet.events()
    assert caught.value.retry_after_s == 7
    assert [len(worker.requests) for worker in workers] == [1, 1, 0]


async def test_all_workers_broken_is_an_upstream_error(fleet: Fleet) -> None:
    await fleet.add(Script(drop_after=-1))
    await fleet.add(Script(drop_after=-1))
    with pytest.raises(UpstreamError, match="2 of the workers"):
        await fleet.events()
    with pytest.raises(OverloadedError):  # both are suspect now
        await fleet.events()


async def test_a_full_fleet_is_a_rate_limit(fleet: Fleet) -> None:
    await fleet.add(Script(refuse=ErrorEvent(code="rate_limit_exceeded", message="queue full"), refuse_status=429))
    await fleet.add(Script(drop_after=-1))
    with pytest.raises(RateLimitError, match="queue full") as caught:
        await fleet.events()
    assert caught.value.retry_after_s


async def test_of_several_full_workers_the_one_that_has_room_soonest_is_named(fleet: Fleet) -> None:
    for retry_after_s in (40, 30, 50):
        full = ErrorEvent(code="rate_limit_exceeded", message=f"in {retry_after_s}", retry_after_s=retry_after_s)
        await fleet.add(Script(refuse=full, refuse_status=429))
    with pytest.raises(RateLimitError, match="in 30") as caught:
        await fleet.events()
    assert caught.value.retry_after_s == 30


async def test_a_refused_request_is_not_tried_elsewhere(fleet: Fleet) -> None:
    too_long = ErrorEvent(code="context_length_exceeded", message="too long", param="messages")
    await fleet.add(Script(refuse=too_long))
    second = await fleet.add()
    with pytest.raises(ContextLengthError, match="too long") as caught:
        await fleet.events()
    assert caught.value.param == "messages"
    assert second.requests == []


async def test_an_unknown_model_lists_those_there_are(fleet: Fleet) -> None:
    await fleet.add()
    with pytest.raises(ModelNotFoundError, match=r"'nope' does not exist.*: m$") as caught:
        await fleet.events("nope")
    assert caught.value.param == "model"


async def test_a_name_close_to_one_that_is_served_is_suggested(fleet: Fleet) -> None:
    name = "smollm2-135m-instruct"
    await fleet.add(models=[ServedModel(name=name, family="llama", max_model_len=64, chat=True, dtype="fp32")])
    with pytest.raises(ModelNotFoundError, match=r"did you mean smollm2-135m-instruct\?"):
        await fleet.events("smollm-135m-instruct")


async def test_a_known_model_without_a_live_worker_is_overloaded(fleet: Fleet) -> None:
    with pytest.raises(OverloadedError) as caught:
        await fleet.events("away")
    assert caught.value.retry_after_s == 2.0


async def test_draining_workers_get_nothing(fleet: Fleet) -> None:
    draining = await fleet.add(stats=WorkerStats(draining=True))
    await fleet.add()
    for _ in range(3):
        await fleet.events()
    assert draining.requests == []


async def test_a_silent_worker_has_failed(start: Start) -> None:
    fleet = await start(worker_timeout_s=0.2)
    await fleet.add(Script(hang_after=-1))
    await fleet.add()
    assert text(await fleet.events()) == "Hello world"


async def test_a_hanging_worker_that_leaves_the_table_is_retried_on_another(fleet: Fleet) -> None:
    first = await fleet.add(Script(hang_after=-1))
    await fleet.add()
    task = asyncio.create_task(fleet.events())
    await until(lambda: bool(first.requests))
    gone = fleet.table.leave("w1")
    fleet.gateway.worker_gone(gone, "is gone")
    assert text(await task) == "Hello world"


# ---------------------------------------------------------------------------------------- after the first event


async def test_a_broken_connection_ends_the_stream_with_one_error(fleet: Fleet) -> None:
    await fleet.add(Script(deltas=("a", "b", "c"), drop_after=2))
    second = await fleet.add()
    events = await fleet.events()
    assert kinds(events) == ["prompt", "delta", "delta", "error"]
    assert events[-1].code == "worker_failed"
    assert second.requests == []
    assert [worker.state for worker in fleet.table] == ["suspect", "ready"]


async def test_a_stream_without_a_terminal_event_is_an_error(fleet: Fleet) -> None:
    await fleet.add(Script(raw=[PromptEvent(num_prompt_tokens=1).model_dump_json().encode() + b"\n"]))
    events = await fleet.events()
    assert kinds(events) == ["prompt", "error"]
    assert events[-1].code == "worker_failed"


async def test_nothing_follows_a_terminal_event(fleet: Fleet) -> None:
    done = b'{"kind":"done","num_prompt_tokens":1,"num_cached_tokens":0,"num_completion_tokens":0}\n'
    await fleet.add(Script(raw=[done + done]))
    assert kinds(await fleet.events()) == ["done"]


async def test_what_came_before_a_malformed_line_is_passed_on(fleet: Fleet) -> None:
    good = DeltaEvent(index=0, text="a", num_tokens=1).model_dump_json().encode()
    prompt = PromptEvent(num_prompt_tokens=1).model_dump_json().encode()
    await fleet.add(Script(raw=[prompt + b"\n" + good + b"\nnot ours\n" + good + b"\n"]))
    events = await fleet.events()
    assert kinds(events) == ["prompt", "delta", "error"]
    assert "malformed" in events[-1].message


async def test_the_workers_own_error_event_is_passed_on(fleet: Fleet) -> None:
    await fleet.add(Script(fail_after=1))
    events = await fleet.events()
    assert kinds(events) == ["prompt", "delta", "error"]
    assert events[-1].code == "internal_error"


async def test_kill_ends_open_streams_at_once(fleet: Fleet) -> None:
    worker = await fleet.add(Script(hang_after=1))
    stream = fleet.gateway.stream(request())
    assert kinds(await first_events(stream, 2)) == ["prompt", "delta"]
    await worker.kill()
    assert kinds([event async for events in stream for event in events]) == ["error"]


async def test_silence_ends_the_stream(start: Start) -> None:
    fleet = await start(worker_timeout_s=0.2)
    await fleet.add(Script(hang_after=1))
    assert kinds(await fleet.events()) == ["prompt", "delta", "error"]


@pytest.mark.parametrize("while_waiting", [True, False])
async def test_a_worker_that_leaves_the_table_ends_its_streams(fleet: Fleet, while_waiting: bool) -> None:
    await fleet.add(Script(hang_after=1))
    stream = fleet.gateway.stream(request())
    await first_events(stream, 2)
    (worker,) = fleet.table
    if while_waiting:
        task = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0)
        fleet.gateway.worker_gone(worker, "is gone")
        (event,) = await task
    else:
        fleet.gateway.worker_gone(worker, "is gone")
        (event,) = await anext(stream)
    assert isinstance(event, ErrorEvent)
    assert event.code == "worker_failed"
    assert [event async for event in stream] == []


async def test_stopping_ends_streams_and_refuses_new_ones(fleet: Fleet) -> None:
    await fleet.add(Script(hang_after=1), Script(hang_after=-1))
    streaming = asyncio.create_task(fleet.events())
    (worker,) = fleet.table
    await until(lambda: worker.num_in_flight == 1)
    waiting = asyncio.create_task(fleet.events())
    await until(lambda: worker.num_in_flight == 2)
    fleet.gateway.stop_streams()
    results = await asyncio.gather(streaming, waiting, return_exceptions=True)
    for result in results:
        assert isinstance(result, OverloadedError) or result[-1].code == "overloaded"
    with pytest.raises(OverloadedError):
        await fleet.events()


async def test_closing_the_stream_cancels_on_the_worker(fleet: Fleet) -> None:
    worker = await fleet.add(Script(hang_after=1))
    stream = fleet.gateway.stream(request())
    await anext(stream)
    await stream.aclose()
    await until(lambda: worker.cancelled == ["r1"])


async def test_cancelling_the_consumer_cancels_on_the_worker(fleet: Fleet) -> None:
    worker = await fleet.add(Script(hang_after=-1))
    task = asyncio.create_task(fleet.events())
    await until(lambda: bool(worker.requests))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await until(lambda: worker.cancelled == ["r1"])


# ------------------------------------------------------------------------------------- tokenize and model lists


async def test_tokenize_and_detokenize_retry_too(fleet: Fleet) -> None:
    first = await fleet.add()
    await fleet.add()
    await first.kill()
    prompt = TextPrompt(text="hé")
    reply = await fleet.gateway.tokenize(TokenizeRequest(model="m@prod", prompt=prompt, return_token_strs=True))
    assert reply.token_ids == list("hé".encode())
    assert (await fleet.gateway.detokenize(DetokenizeRequest(model="m", token_ids=reply.token_ids))).text == "hé"
    with pytest.raises(ModelNotFoundError):
        await fleet.gateway.detokenize(DetokenizeRequest(model="x", token_ids=[1]))


async def test_models_are_merged_over_replicas(fleet: Fleet) -> None:
    def served(name: str, length: int, chat: bool) -> ServedModel:
        return ServedModel(name=name, family="llama", max_model_len=length, chat=chat, dtype="fp32")

    await fleet.add(models=[served("b", 64, True), served("a", 8, True)])
    await fleet.add(models=[served("b", 32, False)])
    fleet.gateway.note_created("a", 1234)
    first, second = fleet.gateway.models()
    assert (first.name, first.max_model_len, first.chat, first.created, first.num_workers) == ("a", 8, True, 1234, 1)
    assert (second.name, second.max_model_len, second.chat, second.num_workers) == ("b", 32, False, 2)
    assert second.created == 1700000000


async def test_sixteen_streams_over_two_workers_when_one_is_killed(fleet: Fleet) -> None:
    script = Script(deltas=tuple("abcdefgh"), delay_s=0.01)
    first = await fleet.add(script)
    await fleet.add(script)
    tasks = [asyncio.create_task(fleet.events()) for _ in range(16)]
    await until(lambda: len(first.requests) == 8)
    await first.kill()
    for events in await asyncio.gather(*tasks):
        assert kinds(events)[-1] in ("done", "error")
        assert kinds(events)[-1] == "error" or text(events) == "abcdefgh"
    assert text(await fleet.events()) == "abcdefgh"

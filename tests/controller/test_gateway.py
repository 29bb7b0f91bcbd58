"""The gateway against fake workers on real loopback sockets."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from types import SimpleNamespace

import pytest

from controller import gateway
from controller.config import WorkerConfig
from controller.gateway import Gateway
from controller.protocol import (
    DeltaEvent,
    DetokenizeRequest,
    ErrorEvent,
    GenerateRequest,
    LoraWeight,
    PromptEvent,
    Sampling,
    ServedModel,
    TextPrompt,
    TokenizeRequest,
    VariantStatus,
    WorkerStats,
)
from controller.routing import RoundRobin
from controller.served_names import ServedName, ServedNames
from controller.trusted_networks import TrustedNetworks
from controller.variants.directory import VariantDirectory
from controller.variants.failures import Failures
from controller.worker_client import GenerateEvents, WorkerClient
from controller.workers import Worker, WorkerTable
from registry.errors import (
    ContextLengthError,
    ModelNotFoundError,
    OverloadedError,
    RateLimitError,
    UpstreamError,
)
from tests.fakes.fake_variants import FakeVariants, digest
from tests.fakes.fake_worker import FakeWorker, Script
from tests.fakes.until import until

LIMIT_S = 20.0  # nothing here waits for it unless it is broken


class Fleet:
    """A gateway and its workers; names resolve to `m` where they are in `aliases`."""

    def __init__(self, config: WorkerConfig) -> None:
        self.table = WorkerTable(clock=lambda: 0.0, expiry_s=1.0)
        self.client = WorkerClient(config, TrustedNetworks.parse(config.trusted_workers))
        self.aliases = {"m@prod": ServedName("m"), "away": ServedName("away"), "sql@prod": ServedName("sql", "m")}
        self.directory = VariantDirectory(self.table, Failures(lambda: 0.0))
        self.gateway = Gateway(
            self.table,
            self.client,
            RoundRobin(random.Random(0)),  # tries the workers in the order in which they were added
            ServedNames(self.table, self.directory, self._resolve, wall_clock=lambda: 1700000000.9),
            self.directory,
            self._bring,
            max_attempts=config.max_attempts,
            retry_after_s=2.0,
        )
        self.brought: list[tuple[str, list[str]]] = []  # worker, variants
        self.on_bring: Callable[[Worker, Sequence[str]], Awaitable[None]] | None = None
        self._stack = contextlib.AsyncExitStack()

    async def _resolve(self, name: str) -> ServedName | None:
        return self.aliases.get(name)

    async def _bring(self, worker: Worker, names: Sequence[str]) -> None:
        self.brought.append((worker.worker_id, list(names)))
        if self.on_bring is not None:
            await self.on_bring(worker, names)

    async def add(self, *scripts: Script, **options: object) -> FakeWorker:
        worker = FakeWorker(f"w{len(self.table) + 1}", scripts[-1] if scripts else Script(), **options)  # type: ignore[arg-type]
        worker.scripts = list(scripts[:-1])
        await self._stack.enter_async_context(worker)
        self.table.register(worker.registration())
        return worker

    async def events(self, model: str = "m", **options: object) -> list[object]:
        async with asyncio.timeout(LIMIT_S):
            stream = self.gateway.stream(request(model), **options)  # type: ignore[arg-type]
            return [event async for events in stream for event in events]

    async def close(self) -> None:
        await self._stack.aclose()
        await self.client.stop()
        assert self.gateway._open_streams == set()
        assert [worker.num_in_flight for worker in self.table] == [0] * len(self.table)


def request(model: str = "m", **sampling: int) -> GenerateRequest:
    return GenerateRequest(request_id="r1", model=model, prompt=TextPrompt(text="hi"), sampling=Sampling(**sampling))


@pytest.fixture
async def start() -> AsyncIterator[Callable[..., Fleet]]:
    fleets: list[Fleet] = []

    async def start(**config: object) -> Fleet:
        fleet = Fleet(WorkerConfig(**config))  # type: ignore[arg-type]
        await fleet.client.start()
        fleets.append(fleet)
        return fleet

    yield start
    for fleet in fleets:
        await fleet.close()


@pytest.fixture
async def fleet(start: Callable[..., Fleet]) -> Fleet:
    return await start()


def kinds(events: list) -> list[str]:
    return [event.kind for event in events]


async def first_events(stream: AsyncIterator[list[GenerateEvents]], number: int) -> list[GenerateEvents]:
    """The first events of a stream whose worker sends so many and then waits."""
    events: list[GenerateEvents] = []
    while len(events) < number:
        events += await anext(stream)
    return events


def text(events: list) -> str:
    return "".join(event.text for event in events if isinstance(event, DeltaEvent))


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


async def test_the_worker_token_is_sent(start: Callable[..., Fleet]) -> None:
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


async def test_each_worker_is_tried_once_and_at_most_max_attempts(start: Callable[..., Fleet]) -> None:
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


async def test_a_silent_worker_has_failed(start: Callable[..., Fleet]) -> None:
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


async def test_silence_ends_the_stream(start: Callable[..., Fleet]) -> None:
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


# ------------------------------------------------------------------------------------------------------ variants


def variants(**states: str) -> FakeVariants:
    statuses = {
        name: VariantStatus(name=name, parent="m", path=name, digest=digest(name), state=state)  # type: ignore[arg-type]
        for name, state in states.items()
    }
    return FakeVariants(statuses=statuses)


async def test_only_workers_that_have_all_adapters_are_asked(fleet: Fleet) -> None:
    await fleet.add(variants=variants(sql="active"))
    both = await fleet.add(variants=variants(sql="on_disk", chat="on_disk"))
    loras = [LoraWeight(name="sql@prod", scale=0.5), LoraWeight(name="chat")]
    stream = fleet.gateway.stream(request().model_copy(update={"loras": loras}))
    assert [event.kind async for events in stream for event in events][-1] == "done"
    (sent,) = both.requests
    assert sent.loras == [LoraWeight(name="sql", scale=0.5), LoraWeight(name="chat")]


async def test_why_nobody_can_be_asked_for_an_adapter(fleet: Fleet) -> None:
    await fleet.add(variants=variants(sql="active", late="registered"))
    await fleet.add(variants=variants(chat="active"))
    together = [LoraWeight(name="sql"), LoraWeight(name="chat")]
    cases = (
        ([LoraWeight(name="late")], "late is registered but not loaded: its workers have not read it yet"),
        (together, "sql, chat is registered but not loaded: no worker has all of them"),
    )
    for loras, message in cases:
        with pytest.raises(OverloadedError) as caught:
            await anext(fleet.gateway.stream(request().model_copy(update={"loras": loras})))
        assert (caught.value.message, caught.value.retry_after_s) == (message, 2.0)


async def test_a_request_waits_while_a_worker_that_just_started_reads_its_adapter(fleet: Fleet) -> None:
    empty = await fleet.add()
    late = await fleet.add(variants=variants(sql="registered"))

    async def bring(worker: Worker, names: Sequence[str]) -> None:
        if worker.worker_id == late.worker_id:
            await asyncio.sleep(0)
            worker.variants["sql"] = late.variants.change("sql", state="on_disk")

    fleet.on_bring = bring
    assert kinds(await fleet.events("sql@prod"))[-1] == "done"
    assert fleet.brought == [(empty.worker_id, ["sql"]), (late.worker_id, ["sql"])]
    assert (len(empty.requests), len(late.requests)) == (0, 1)


async def test_a_request_does_not_wait_for_ever_for_its_adapter(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway, "BRING_S", 0.01)
    await fleet.add(variants=variants(sql="registered"))

    async def bring(worker: Worker, names: Sequence[str]) -> None:
        await asyncio.Event().wait()

    fleet.on_bring = bring
    with pytest.raises(OverloadedError, match="have not read it yet"):
        await fleet.events("sql")


async def test_an_adapter_goes_elsewhere_when_its_worker_fails(fleet: Fleet) -> None:
    first = await fleet.add(Script(drop_after=-1), variants=variants(sql="active"))
    second = await fleet.add(variants=variants(sql="on_disk"))
    assert kinds(await fleet.events("sql@prod"))[-1] == "done"
    assert (len(first.requests), len(second.requests)) == (1, 1)
    await second.kill()
    with pytest.raises(UpstreamError):
        await fleet.events("sql")


async def test_an_adapter_that_is_removed_while_a_request_is_on_its_way_is_not_found(fleet: Fleet) -> None:
    gone = Script(refuse=ErrorEvent(code="model_not_found", message="no adapter sql", param="model"), refuse_status=404)
    await fleet.add(gone, variants=variants(sql="active"))
    with pytest.raises(ModelNotFoundError, match="no adapter sql"):
        await fleet.events("sql")
    fleet.directory.wanted = {"sql": SimpleNamespace(parent="m", digest=None)}  # and added again in the meantime
    with pytest.raises(OverloadedError, match="no adapter sql"):
        await fleet.events("sql")


async def test_an_adapter_for_which_no_worker_has_room_may_have_some_later(fleet: Fleet) -> None:
    full = Script(refuse=ErrorEvent(code="insufficient_memory", message="2 are pinned"), refuse_status=400)
    workers = [await fleet.add(full, variants=variants(sql="on_disk")) for _ in range(2)]
    with pytest.raises(OverloadedError, match="2 are pinned") as caught:
        await fleet.events("sql")
    assert caught.value.retry_after_s is not None
    assert [len(worker.requests) for worker in workers] == [1, 1]


@pytest.mark.parametrize("code", ["checkpoint_invalid", "model_unsupported"])
async def test_errors_about_files_do_not_name_them(fleet: Fleet, code: str) -> None:
    error = ErrorEvent(code=code, message="/srv/adapters/sql/adapter_config.json is not JSON")
    worker = await fleet.add(variants=variants(sql="active"))
    worker.scripts += [Script(refuse=error), Script(fail_first=error)]
    for _ in range(2):
        with pytest.raises(UpstreamError, match="the files of sql cannot be used") as caught:
            await fleet.events("sql")
        assert "/srv" not in caught.value.message
    prompt, done = PromptEvent(num_prompt_tokens=3), error
    worker.scripts.append(Script(raw=[event.model_dump_json().encode() + b"\n" for event in (prompt, done)]))
    last = (await fleet.events("sql"))[-1]
    assert last.kind == "error"
    assert last.code == "worker_failed"
    assert "/srv" not in last.message


async def test_variants_are_listed_after_their_model(fleet: Fleet) -> None:
    await fleet.add(variants=variants(sql="active", broken="failed"))
    await fleet.add(variants=variants(sql="on_disk", chat="on_disk"))
    model, chat, sql = fleet.gateway.models()
    assert (model.name, model.parent, model.root) == ("m", None, "m")
    assert (chat.name, chat.parent, chat.root, chat.num_workers) == ("chat", "m", digest("chat"), 1)
    assert (sql.name, sql.digest, sql.max_model_len, sql.num_workers) == ("sql", digest("sql"), 128, 2)
    assert sql.created == 1700000000

"""Requests for adapters: which worker gets them, and what is said when none can."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from types import SimpleNamespace

import pytest

from controller import gateway
from controller.protocol import (
    ErrorEvent,
    LoraWeight,
    PromptEvent,
    VariantStatus,
)
from controller.served_names import ServedName
from controller.workers import Worker
from registry.errors import (
    ModelNotFoundError,
    OverloadedError,
    UpstreamError,
)
from tests.fakes.fake_variants import FakeVariants, digest
from tests.fakes.fake_worker import Script
from tests.fakes.gateway_fleet import Fleet, kinds, request


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


async def test_a_release_is_suggested_by_a_name_that_can_be_asked_for(fleet: Fleet) -> None:
    await fleet.add(variants=variants(**{"support-bot@v1": "active"}))
    with pytest.raises(ModelNotFoundError, match=r"did you mean support-bot@v1\?"):
        await fleet.events("suport-bot")
    fleet.aliases["support-bot"] = ServedName("support-bot@v1", "m")
    with pytest.raises(ModelNotFoundError, match=r"did you mean support-bot\?"):
        await fleet.events("suport-bot")


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

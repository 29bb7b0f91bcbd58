"""The catalog's variants on fake workers behind a real controller: starts, restarts, failures, other files."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack

import pytest

from controller.variants import failures, reconciler
from registry.catalog import Catalog
from tests.controller.conftest import RunningController, StartController
from tests.fakes.fake_variants import FakeVariants, VariantRefused, digest
from tests.fakes.fake_worker import FakeWorker
from tests.fakes.until import until

FILES = {"sql": digest("sql"), "chat": digest("chat"), "sql-2": digest("sql-2")}
PATIENT = {"heartbeat_interval_s": 60.0}  # a test sends heartbeats when it wants to
StartWorker = Callable[..., Awaitable[FakeWorker]]


@pytest.fixture(autouse=True)
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each comparison reads the catalog, and what failed is tried again at the next one."""
    monkeypatch.setattr(reconciler, "REFRESH_S", 0.0)
    monkeypatch.setattr(failures, "FIRST_PAUSE_S", 0.0)


@pytest.fixture
async def start_worker() -> AsyncIterator[StartWorker]:
    async with AsyncExitStack() as stack:

        async def start(worker_id: str = "w1", **files: str) -> FakeWorker:
            worker = FakeWorker(worker_id, variants=FakeVariants(files={**FILES, **files}))
            return await stack.enter_async_context(worker)

        yield start


def want(catalog: Catalog, name: str, *, path: str = "", pinned: bool = False, replace: bool = False) -> None:
    catalog.add_variant(name, parent="m", path=path or name, pinned=pinned, replace=replace, actor="cli:test")


async def settled(controller: RunningController, *workers: FakeWorker) -> None:
    """Let each worker be compared with the catalog once more, to the end."""
    for worker in workers:
        assert (await worker.heartbeat(controller.url)).status == 200
    await until(lambda: not controller.state.reconciler._tasks)


async def test_a_worker_is_filled_pins_first_and_follows_every_change(
    start_controller: StartController, start_worker: StartWorker, catalog: Catalog
) -> None:
    want(catalog, "chat")
    want(catalog, "sql", pinned=True)
    controller, worker = await start_controller(**PATIENT), await start_worker()
    await worker.register(controller.url)
    await until(lambda: len(worker.variants.statuses) == 2)
    await settled(controller, worker)
    assert worker.variants.calls == ["add sql", "add chat"]
    assert worker.variants.statuses["sql"].pinned
    assert catalog.get_variant("sql").digest == FILES["sql"]  # learned from the worker
    catalog.pin_variant("chat", True, actor="cli:test")
    catalog.pin_variant("sql", False, actor="cli:test")
    await settled(controller, worker)
    assert [worker.variants.statuses[name].pinned for name in ("chat", "sql")] == [True, False]
    catalog.remove_variant("chat", actor="cli:test")
    await settled(controller, worker)
    assert set(worker.variants.statuses) == {"sql"}
    del worker.variants.calls[:]
    await settled(controller, worker)
    assert worker.variants.calls == []


async def test_everything_comes_back_after_kill_9_of_controller_and_workers(
    start_controller: StartController, start_worker: StartWorker, catalog: Catalog
) -> None:
    first, worker = await start_controller(**PATIENT), await start_worker()
    await worker.register(first.url)
    for name, pinned in (("sql", True), ("chat", False)):
        body = {"name": name, "path": name, "pinned": pinned}
        assert (await first.post("/admin/variants", json=body)).status == 200
    await worker.kill()
    second, again = (
        await start_controller(**PATIENT),
        await start_worker(),
    )  # nothing of the first two but the catalog
    await again.register(second.url)
    await until(lambda: len(again.variants.statuses) == 2)
    assert again.variants.statuses["sql"].pinned
    assert not again.variants.statuses["chat"].pinned
    response = await second.post("/v1/completions", json={"model": "sql", "prompt": "x"})
    assert response.status == 200
    assert again.requests[0].loras[0].name == "sql"


async def test_a_request_for_an_adapter_that_is_not_read_yet_goes_before_the_others(
    start_controller: StartController, start_worker: StartWorker, catalog: Catalog
) -> None:
    for name in ("chat", "sql", "sql-2"):
        want(catalog, name)
    controller, worker = await start_controller(**PATIENT), await start_worker()
    worker.variants.hold = asyncio.Event()
    await worker.register(controller.url)
    await until(lambda: worker.variants.calls == ["add chat"])
    body = {"model": "sql-2", "prompt": "x"}
    answers = [asyncio.create_task(controller.post("/v1/completions", json=body)) for _ in range(2)]
    await until(lambda: len(worker.variants.calls) == 2)
    worker.variants.hold.set()
    assert [(await answer).status for answer in answers] == [200, 200]
    await until(lambda: len(worker.variants.statuses) == 3)
    await settled(controller, worker)
    assert worker.variants.calls == ["add chat", "add sql-2", "add sql"]


async def test_a_restarted_controller_leaves_a_worker_that_is_right_alone(
    start_controller: StartController, start_worker: StartWorker, catalog: Catalog
) -> None:
    first, worker = await start_controller(**PATIENT), await start_worker()
    await worker.register(first.url)
    assert (await first.post("/admin/variants", json={"name": "sql", "path": "sql", "pinned": True})).status == 200
    second = await start_controller(**PATIENT)
    assert (await worker.heartbeat(second.url)).status == 404
    await worker.register(second.url)
    await settled(second, worker)
    assert worker.variants.calls == ["add sql"]


async def test_variants_of_the_command_line_are_not_touched(
    start_controller: StartController, start_worker: StartWorker, catalog: Catalog
) -> None:
    controller, worker = await start_controller(**PATIENT), await start_worker()
    worker.variants.from_command_line("own", "chat")
    await worker.register(controller.url)
    await settled(controller, worker)
    assert worker.variants.calls == []
    assert (await controller.post("/v1/completions", json={"model": "own", "prompt": "x"})).status == 200


async def test_a_failure_is_shown_tried_again_and_holds_nobody_up(
    start_controller: StartController, start_worker: StartWorker, catalog: Catalog
) -> None:
    want(catalog, "a", path="missing")
    want(catalog, "sql")
    controller, worker = await start_controller(**PATIENT), await start_worker()
    await worker.register(controller.url)
    await until(lambda: "sql" in worker.variants.statuses)
    (shown, _) = (await (await controller.get("/admin/variants")).json())["variants"]
    (on,) = shown["workers"]
    assert (shown["name"], on["status"], on["usable"]) == ("a", None, False)
    assert on["error"] == {"code": "checkpoint_invalid", "message": "there is no adapter at missing"}
    response = await controller.post("/v1/completions", json={"model": "a", "prompt": "x"})
    assert response.status == 503
    message = (await response.json())["error"]["message"]
    assert message.startswith("a is registered but not loaded: its workers could not load it;")
    assert "missing" not in message
    worker.variants.files["missing"] = digest("found")
    await settled(controller, worker)
    assert (await controller.post("/v1/completions", json={"model": "a", "prompt": "x"})).status == 200


async def test_the_pause_after_a_failure_is_kept(
    start_controller: StartController,
    start_worker: StartWorker,
    catalog: Catalog,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(failures, "FIRST_PAUSE_S", 1000.0)
    want(catalog, "a", path="missing")
    controller, worker = await start_controller(**PATIENT), await start_worker()
    await worker.register(controller.url)
    for _ in range(3):
        await settled(controller, worker)
    assert worker.variants.calls == ["add a"]


async def test_a_change_of_what_is_wanted_ends_the_pause(
    start_controller: StartController,
    start_worker: StartWorker,
    catalog: Catalog,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(failures, "FIRST_PAUSE_S", 1000.0)
    want(catalog, "a", path="missing")
    controller, worker = await start_controller(**PATIENT), await start_worker()
    await worker.register(controller.url)
    await settled(controller, worker)
    assert worker.variants.calls == ["add a"]
    want(catalog, "a", path="sql", replace=True)
    await settled(controller, worker)
    assert worker.variants.statuses["a"].digest == FILES["sql"]


async def test_other_files_of_a_command_line_are_warned_of_once_and_get_no_requests(
    start_controller: StartController, start_worker: StartWorker, caplog: pytest.LogCaptureFixture
) -> None:
    controller, first = await start_controller(**PATIENT), await start_worker("first")
    second = await start_worker("second", chat=digest("other"))
    for worker in (first, second):
        worker.variants.from_command_line("own", "chat")
        await worker.register(controller.url)
    await settled(controller, first, second)
    await settled(controller, first, second)
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 1
    assert "worker second has other files under chat" in warnings[0]
    for _ in range(8):
        assert (await controller.post("/v1/completions", json={"model": "own", "prompt": "x"})).status == 200
    assert (len(first.requests), len(second.requests)) == (8, 0)
    (shown,) = (await (await controller.get("/admin/variants")).json())["variants"]
    assert [(on["usable"], on["error"] is None) for on in shown["workers"]] == [(True, True), (False, False)]
    await first.register(controller.url)  # it comes back after a while; what was decided holds
    await settled(controller, first, second)
    assert (await controller.post("/v1/completions", json={"model": "own", "prompt": "x"})).status == 200
    assert (len(first.requests), len(second.requests)) == (9, 0)


async def test_a_worker_that_does_not_answer_does_not_hold_up_heartbeats_or_others(
    start_controller: StartController, start_worker: StartWorker, catalog: Catalog
) -> None:
    want(catalog, "sql")
    catalog.set_variant_digest(catalog.get_variant("sql"), FILES["sql"], actor="cli:test")
    want(catalog, "chat")
    controller, slow, other = (
        await start_controller(**PATIENT),
        await start_worker("slow"),
        await start_worker("other"),
    )
    slow.variants.hold = asyncio.Event()
    await slow.register(controller.url)
    await until(lambda: slow.variants.calls == ["add chat"])
    for _ in range(3):
        assert (await slow.heartbeat(controller.url)).status == 200
    assert slow.variants.calls == ["add chat"]
    slow.variants.hold.set()
    await other.register(controller.url)
    await until(lambda: len(other.variants.statuses) == 2 and len(slow.variants.statuses) == 2)


async def test_a_worker_with_other_files_is_not_routed_to_and_says_so(
    start_controller: StartController, start_worker: StartWorker, catalog: Catalog
) -> None:
    controller, right = await start_controller(**PATIENT), await start_worker("right")
    wrong = await start_worker("wrong", sql=digest("other"))
    await right.register(controller.url)
    assert (await controller.post("/admin/variants", json={"name": "sql", "path": "sql"})).status == 200
    await wrong.register(controller.url)
    await settled(controller, right, wrong)
    for _ in range(8):
        assert (await controller.post("/v1/completions", json={"model": "sql", "prompt": "x"})).status == 200
    assert (len(right.requests), len(wrong.requests)) == (8, 0)
    (shown,) = (await (await controller.get("/admin/variants")).json())["variants"]
    assert [(on["worker_id"], on["usable"]) for on in shown["workers"]] == [("right", True), ("wrong", False)]
    error = shown["workers"][1]["error"]["message"]
    assert digest("other") in error
    assert FILES["sql"] in error
    wrong.variants.files["sql"] = FILES["sql"]  # mended on its disk
    await settled(controller, wrong)
    (shown,) = (await (await controller.get("/admin/variants")).json())["variants"]
    assert [on["usable"] for on in shown["workers"]] == [True, True]


async def test_a_removal_that_a_worker_missed_is_made_up_for(
    start_controller: StartController, start_worker: StartWorker, catalog: Catalog
) -> None:
    controller, worker = await start_controller(**PATIENT), await start_worker()
    await worker.register(controller.url)
    assert (await controller.post("/admin/variants", json={"name": "sql", "path": "sql"})).status == 200
    worker.variants.refuse["remove sql"] = VariantRefused(500, "internal_error", "not now")
    async with controller.client.delete(controller.url + "/admin/variants/sql") as response:
        removed = await response.json()
    assert (response.status, removed["wanted"]) == (200, None)
    assert removed["workers"][0]["error"]["message"] == "not now"
    worker.variants.refuse.clear()
    await settled(controller, worker)
    assert worker.variants.statuses == {}
    assert (await controller.get("/admin/variants/sql")).status == 404


@pytest.mark.parametrize("seed", range(4))
async def test_whatever_happened_workers_end_up_with_what_is_wanted(
    start_controller: StartController, start_worker: StartWorker, catalog: Catalog, seed: int
) -> None:
    """Changes at the API and in the catalog, failures, missed messages and restarts, in any order."""
    rng = random.Random(seed)
    controller = await start_controller(**PATIENT)
    workers = [await start_worker("w0"), await start_worker("w1")]
    for worker in workers:
        await worker.register(controller.url)

    async def step() -> None:
        name, path = rng.choice(["a", "b", "c"]), rng.choice([*FILES, "missing"])
        worker = rng.choice(workers)
        match rng.randrange(8):
            case 0 | 1:
                body = {"name": name, "path": path, "pinned": rng.random() < 0.5, "replace": True}
                assert (await controller.post("/admin/variants", json=body)).status in (200, 400, 500)
            case 2:
                await controller.post(f"/admin/variants/{name}/{rng.choice(['pin', 'unpin', 'activate', 'evict'])}")
            case 3:
                async with controller.client.delete(f"{controller.url}/admin/variants/{name}"):
                    pass
            case 4:
                want(catalog, name, path=path, pinned=rng.random() < 0.5, replace=True)
            case 5:
                verb = rng.choice(["add", "remove", "pin"])
                worker.variants.refuse[f"{verb} {name}"] = VariantRefused(500, "internal_error", "not now")
            case 6:
                worker.variants.statuses.clear()  # started again, and nothing on its command line
                await worker.register(controller.url)
            case 7:
                await settled(controller, worker)

    for _ in range(40):
        await step()
    for worker in workers:
        worker.variants.refuse.clear()
        worker.variants.files["missing"] = digest("found")
    for _ in range(3):
        await settled(controller, *workers)
    wanted = {record.name: (record.digest, record.pinned) for record in catalog.list_variants()}
    for worker in workers:
        has = {name: (status.digest, status.pinned) for name, status in worker.variants.statuses.items()}
        assert has == wanted
        await worker.heartbeat(controller.url)
        for name in wanted:
            assert all(on.usable for on in controller.state.directory.on_workers(name))

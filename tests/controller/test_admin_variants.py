from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import pytest

from controller.protocol import ServedModel
from registry.catalog import Catalog
from registry.names import ModelName
from tests.controller.conftest import RunningController, StartController
from tests.fakes.fake_variants import FakeVariants, VariantRefused, digest
from tests.fakes.fake_worker import FakeWorker

FILES = {"sql": digest("sql"), "chat": digest("chat"), "sql-2": digest("sql-2")}
OTHER = ServedModel(name="other", family="llama", max_model_len=64, chat=True, dtype="fp32")
LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"


@dataclass(frozen=True, slots=True)
class Fleet:
    """A controller with two workers of the model m."""

    controller: RunningController
    first: FakeWorker
    second: FakeWorker

    async def post(self, path: str, body: Any = None) -> tuple[int, Any]:
        response = await self.controller.post(path, json=body)
        return response.status, await response.json() if response.content_type == "application/json" else None

    async def message(self, path: str, body: Any = None) -> str:
        """The message of the error 4xx that `path` answers with."""
        status, answer = await self.post(path, body)
        assert 400 <= status < 500, answer
        message: str = answer["error"]["message"]
        return message


@pytest.fixture
async def fleet(start_controller: StartController) -> AsyncIterator[Fleet]:
    controller = await start_controller(heartbeat_interval_s=60.0)  # nobody sends any
    async with (
        FakeWorker("w1", variants=FakeVariants(files=dict(FILES))) as first,
        FakeWorker("w2", variants=FakeVariants(files=dict(FILES))) as second,
    ):
        for worker in (first, second):
            assert (await worker.register(controller.url)).status == 200
        yield Fleet(controller, first, second)


async def test_a_life_of_a_variant_on_all_replicas(fleet: Fleet, catalog: Catalog) -> None:
    status, added = await fleet.post("/admin/variants", {"name": "team/sql", "path": "sql", "pinned": True})
    assert status == 200
    assert (added["name"], added["parent"], added["wanted"]["digest"]) == ("team/sql", "m", FILES["sql"])
    assert [(on["worker_id"], on["status"]["state"], on["usable"]) for on in added["workers"]] == [
        ("w1", "active", True), ("w2", "active", True),
    ]  # fmt: skip
    for verb, pinned, state in (("unpin", False, "active"), ("evict", False, "on_disk"), ("activate", False, "active"),
                                ("pin", True, "active")):  # fmt: skip
        status, shown = await fleet.post(f"/admin/variants/team/sql/{verb}")
        assert status == 200, shown
        assert shown["wanted"]["pinned"] is pinned
        assert {on["status"]["state"] for on in shown["workers"]} == {state}
    one = await (await fleet.controller.get("/admin/variants/team/sql")).json()
    assert one == (await (await fleet.controller.get("/admin/variants")).json())["variants"][0]
    async with fleet.controller.client.delete(fleet.controller.url + "/admin/variants/team/sql") as response:
        assert response.status == 200
    assert fleet.first.variants.statuses == fleet.second.variants.statuses == {}
    assert catalog.list_variants() == []
    assert {entry.actor for entry in catalog.audit_entries(subject="team/sql")} == {"api", "controller"}


async def test_vllms_routes(fleet: Fleet, catalog: Catalog) -> None:
    response = await fleet.controller.post(LOAD, json={"lora_name": "sql", "lora_path": "sql"})
    assert (response.status, await response.text()) == (200, "Success: LoRA adapter 'sql' added successfully.")
    assert "there is a variant sql already" in await fleet.message(LOAD, {"lora_name": "sql", "lora_path": "sql"})
    body = {"lora_name": "sql", "lora_path": "sql-2", "load_inplace": True}
    assert (await fleet.controller.post(LOAD, json=body)).status == 200
    assert fleet.second.variants.statuses["sql"].digest == catalog.get_variant("sql").digest == FILES["sql-2"]
    response = await fleet.controller.post(UNLOAD, json={"lora_name": "sql"})
    assert (response.status, await response.text()) == (200, "Success: LoRA adapter 'sql' removed successfully.")
    assert (await fleet.post(UNLOAD, {"lora_name": "sql"}))[0] == 404


async def test_a_variant_is_of_the_kind_that_its_files_are(fleet: Fleet) -> None:
    for worker in (fleet.first, fleet.second):
        worker.variants.deltas = {"sql-2"}
    for name, path in (("adapter", "sql"), ("tuned", "sql-2")):
        assert (await fleet.post(LOAD, {"lora_name": name, "lora_path": path}))[0] == 200
    shown = (await (await fleet.controller.get("/admin/variants")).json())["variants"]
    assert {variant["name"]: variant["kind"] for variant in shown} == {"adapter": "lora", "tuned": "delta"}
    assert shown[1]["workers"][0]["status"]["kind"] == "delta"


async def test_the_same_path_with_other_files_is_read_again(fleet: Fleet, catalog: Catalog) -> None:
    assert (await fleet.post(LOAD, {"lora_name": "sql", "lora_path": "sql"}))[0] == 200
    for worker in (fleet.first, fleet.second):
        worker.variants.files["sql"] = digest("trained on")
    assert (await fleet.post(LOAD, {"lora_name": "sql", "lora_path": "sql", "load_inplace": True}))[0] == 200
    assert catalog.get_variant("sql").digest == digest("trained on")
    (shown,) = (await (await fleet.controller.get("/admin/variants")).json())["variants"]
    assert [on["usable"] for on in shown["workers"]] == [True, True]


async def test_what_no_worker_can_read_is_not_kept(fleet: Fleet, catalog: Catalog) -> None:
    assert await fleet.message(LOAD, {"lora_name": "sql", "lora_path": "none"}) == "there is no adapter at none"
    assert catalog.list_variants() == []
    assert (await fleet.post("/v1/completions", {"model": "sql", "prompt": "x"}))[0] == 404
    await fleet.post(LOAD, {"lora_name": "sql", "lora_path": "sql"})
    before = catalog.get_variant("sql")
    body = {"lora_name": "sql", "lora_path": "none", "load_inplace": True}
    assert await fleet.message(LOAD, body) == "there is no adapter at none"
    after = catalog.get_variant("sql")
    assert (after.path, after.digest) == (before.path, before.digest)
    assert (await fleet.post("/v1/completions", {"model": "sql", "prompt": "x"}))[0] == 200


async def test_one_worker_that_can_read_it_is_enough(fleet: Fleet) -> None:
    del fleet.first.variants.files["sql"]
    status, added = await fleet.post("/admin/variants", {"name": "sql", "path": "sql"})
    assert status == 200
    assert [on["usable"] for on in added["workers"]] == [False, True]
    assert added["workers"][0]["error"]["message"] == "there is no adapter at sql"
    assert added["workers"][0]["retry_in_s"] > 0
    for _ in range(4):
        assert (await fleet.post("/v1/completions", {"model": "sql", "prompt": "x"}))[0] == 200
    assert len(fleet.second.requests) == 4


async def test_replicas_that_read_other_files(fleet: Fleet) -> None:
    fleet.second.variants.files["sql"] = digest("stale")
    status, added = await fleet.post("/admin/variants", {"name": "sql", "path": "sql"})
    assert (status, added["wanted"]["digest"]) == (200, FILES["sql"])
    assert [on["usable"] for on in added["workers"]] == [True, False]
    assert digest("stale") in added["workers"][1]["error"]["message"]


async def test_names_that_are_taken(fleet: Fleet, catalog: Catalog) -> None:
    fleet.first.variants.from_command_line("own", "chat")
    await fleet.first.heartbeat(fleet.controller.url)
    for name, reason in (("m", "m is the name of a model"), ("own", "--delta own="), ("a@b", "invalid model name")):
        assert reason in await fleet.message("/admin/variants", {"name": name, "path": "sql"})
        assert reason in await fleet.message(LOAD, {"lora_name": name, "lora_path": "sql"})
    assert catalog.list_variants() == []
    for path in ("/admin/variants/own/pin", "/admin/variants/own/unpin"):
        assert "--lora or --delta own=" in await fleet.message(path)
    assert "--lora or --delta own=" in await fleet.message(UNLOAD, {"lora_name": "own"})
    assert (await fleet.post("/admin/variants/own/evict"))[0] == 200
    status, answer = await fleet.post("/admin/variants/none/evict")
    assert (status, answer["error"]["code"]) == (404, "model_not_found")


async def test_a_worker_whose_model_or_adapter_clashes_is_refused(fleet: Fleet) -> None:
    await fleet.post("/admin/variants", {"name": "sql", "path": "sql"})
    async with FakeWorker("w3", models=[OTHER.model_copy(update={"name": "sql"})]) as clashing:
        response = await clashing.register(fleet.controller.url)
        assert response.status == 400
        assert "sql would be the name of a model and of a variant" in await response.text()
    async with FakeWorker("w4", models=[OTHER], variants=FakeVariants(files=dict(FILES))) as clashing:
        clashing.variants.from_command_line("m", "chat", parent="other")
        assert (await clashing.register(fleet.controller.url)).status == 400


async def test_the_base_model_must_be_named_when_there_are_several(fleet: Fleet) -> None:
    async with FakeWorker("w3", models=[OTHER], variants=FakeVariants(files=dict(FILES))) as third:
        await third.register(fleet.controller.url)
        message = await fleet.message(LOAD, {"lora_name": "sql", "lora_path": "sql"})
        assert message.startswith("2 base models are served (m, other); say which one")
        body = {"lora_name": "sql", "lora_path": "sql", "base_model_name": "other"}
        assert (await fleet.post(LOAD, body))[0] == 200
        assert list(third.variants.statuses) == ["sql"]
        assert fleet.first.variants.statuses == {}
        body = {"lora_name": "sql", "lora_path": "sql", "base_model_name": "m", "load_inplace": True}
        assert "sql is a variant of other" in await fleet.message(LOAD, body)
        assert "not served" in await fleet.message(LOAD, {**body, "base_model_name": "none"})


async def test_activating_where_one_replica_cannot(fleet: Fleet) -> None:
    await fleet.post("/admin/variants", {"name": "sql", "path": "sql"})
    refused = VariantRefused(400, "insufficient_memory", "pins fill the memory")
    fleet.first.variants.refuse["activate sql"] = refused
    status, shown = await fleet.post("/admin/variants/sql/activate")
    assert status == 200
    assert [(on["status"]["state"], on["error"]) for on in shown["workers"]] == [
        ("in_host_memory", {"code": "insufficient_memory", "message": "pins fill the memory"}), ("active", None),
    ]  # fmt: skip
    fleet.second.variants.refuse["activate sql"] = refused
    assert await fleet.message("/admin/variants/sql/activate") == "pins fill the memory"


async def test_a_pin_that_every_worker_refuses_is_not_kept(fleet: Fleet, catalog: Catalog) -> None:
    await fleet.post("/admin/variants", {"name": "sql", "path": "sql"})
    refused = VariantRefused(400, "insufficient_memory", "pins fill the memory")
    fleet.first.variants.refuse["pin sql"] = fleet.second.variants.refuse["pin sql"] = refused
    assert await fleet.message("/admin/variants/sql/pin") == "pins fill the memory"
    assert not catalog.get_variant("sql").pinned
    del fleet.second.variants.refuse["pin sql"]
    status, shown = await fleet.post("/admin/variants/sql/pin")
    assert (status, catalog.get_variant("sql").pinned) == (200, True)
    assert [on["status"]["pinned"] for on in shown["workers"]] == [False, True]
    assert shown["workers"][0]["error"]["message"] == "pins fill the memory"


async def test_an_alias_of_a_variant(fleet: Fleet, catalog: Catalog) -> None:
    await fleet.post("/admin/variants", {"name": "sql", "path": "sql"})
    catalog.set_alias("helper", "prod", ModelName("sql"), actor="cli:me")
    for name in ("helper@prod", f"sql@{FILES['sql']}"):
        status, answer = await fleet.post("/v1/completions", {"model": name, "prompt": "x"})
        assert (status, answer["model"]) == (200, name)
    requests = fleet.first.requests + fleet.second.requests
    assert [(request.model, request.loras[0].name) for request in requests] == [("m", "sql")] * 2
    async with fleet.controller.client.delete(fleet.controller.url + "/admin/variants/sql") as response:
        assert response.status == 400
    assert "sql" in fleet.first.variants.statuses


async def test_models_list_variants_with_root_and_parent(fleet: Fleet, catalog: Catalog) -> None:
    await fleet.post("/admin/variants", {"name": "team/sql", "path": "sql"})
    base, variant = (await (await fleet.controller.get("/v1/models")).json())["data"]
    assert (base["id"], base["root"], base["parent"]) == ("m", "m", None)
    assert (variant["id"], variant["root"], variant["parent"]) == ("team/sql", FILES["sql"], "m")
    assert variant["created"] == int(catalog.get_variant("team/sql").created_at.timestamp())
    assert await (await fleet.controller.get("/v1/models/team/sql")).json() == variant


async def test_several_adapters_with_scales(fleet: Fleet) -> None:
    for name in ("sql", "chat"):
        await fleet.post("/admin/variants", {"name": name, "path": name})
    loras = [{"name": "sql", "scale": 0.5}, {"name": "chat", "scale": -2}]
    request = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "loras": loras}
    status, answer = await fleet.post("/v1/chat/completions", request)
    assert (status, answer["model"]) == (200, "m")
    (sent,) = fleet.first.requests + fleet.second.requests
    assert [(lora.name, lora.scale) for lora in sent.loras] == [("sql", 0.5), ("chat", -2.0)]


@pytest.mark.parametrize(
    ("model", "loras", "status", "reason"),
    [
        ("m", [{"name": "none"}], 404, "'none' does not exist"),
        ("m", [{"name": "m"}], 400, "m is a model, not a variant of m"),
        ("m", [{"name": "sql"}, {"name": "sql", "scale": 2}], 400, "sql is given twice"),
        ("sql", [{"name": "sql"}], 400, "sql is a variant of m; give m as model"),
        ("m", [{"name": f"v{i}"} for i in range(9)], 400, "at most 8"),
        ("m", [{"name": "sql", "scale": "1"}], 400, "loras[0].scale"),
        ("m", [{"name": "sql", "weight": 1.0}], 400, "loras[0].weight"),
        ("m", [{"scale": 1.0}], 400, "loras[0].name"),
    ],
)
async def test_loras_that_do_not_fit(fleet: Fleet, model: str, loras: list[Any], status: int, reason: str) -> None:
    await fleet.post("/admin/variants", {"name": "sql", "path": "sql"})
    got, answer = await fleet.post("/v1/completions", {"model": model, "prompt": "x", "loras": loras})
    assert (got, answer["error"]["param"].split("[")[0]) == (status, "loras")
    assert reason in answer["error"]["message"]
    assert fleet.first.requests == fleet.second.requests == []


@pytest.mark.parametrize("scale", ["NaN", "Infinity", "1e999"])
async def test_scales_must_be_finite(fleet: Fleet, scale: str) -> None:
    body = f'{{"model": "m", "prompt": "x", "loras": [{{"name": "sql", "scale": {scale}}}]}}'
    headers = {"content-type": "application/json"}
    response = await fleet.controller.post("/v1/completions", data=body, headers=headers)
    assert response.status == 400


@pytest.mark.parametrize("parent", [{}, {"base_model_name": "m"}])
async def test_loading_waits_for_a_worker(start_controller: StartController, parent: dict[str, str]) -> None:
    controller = await start_controller()
    response = await controller.post(LOAD, json={"lora_name": "sql", "lora_path": "sql", **parent})
    assert (response.status, response.headers["retry-after"]) == (503, "2")
    assert "no worker is ready" in (await response.json())["error"]["message"]


async def test_requests_follow_the_variant(fleet: Fleet) -> None:
    await fleet.post("/admin/variants", {"name": "sql", "path": "sql"})
    fleet.second.variants.change("sql", state="active")
    await fleet.second.heartbeat(fleet.controller.url)
    for number in range(6):
        assert (await fleet.post("/v1/completions", {"model": "sql", "prompt": f"{number} x"}))[0] == 200
    assert (len(fleet.first.requests), len(fleet.second.requests)) == (0, 6)


async def test_a_replica_that_fails_is_replaced_by_one_that_has_the_variant(fleet: Fleet) -> None:
    await fleet.post("/admin/variants", {"name": "sql", "path": "sql"})
    fleet.first.variants.change("sql", state="active")
    await fleet.first.heartbeat(fleet.controller.url)
    await fleet.first.kill()
    assert (await fleet.post("/v1/completions", {"model": "sql", "prompt": "x"}))[0] == 200
    assert len(fleet.second.requests) == 1


async def test_tokenizing_for_a_variant_is_its_base_models_affair(fleet: Fleet) -> None:
    await fleet.post("/admin/variants", {"name": "sql", "path": "sql"})
    for body in ({"model": "sql", "prompt": "ab"}, {"prompt": "ab"}):
        assert (await fleet.post("/tokenize", body))[1]["tokens"] == [97, 98]


async def test_loading_needs_an_admin_key(start_controller: StartController, catalog: Catalog) -> None:
    controller = await start_controller(auth="required", heartbeat_interval_s=60.0)
    keys = {role: catalog.create_api_key(role, role=role, actor="test") for role in ("user", "admin")}
    async with FakeWorker(variants=FakeVariants(files=dict(FILES))) as worker:
        await worker.register(controller.url)
        for path, body in ((LOAD, {"lora_name": "sql", "lora_path": "sql"}), (UNLOAD, {"lora_name": "sql"}),
                           ("/admin/variants", {"name": "chat", "path": "chat"})):  # fmt: skip
            for role, status in (("user", 403), ("admin", 200)):
                headers = {"authorization": f"Bearer {keys[role][1]}"}
                assert (await controller.post(path, json=body, headers=headers)).status == status
    entry = catalog.audit_entries(subject="sql")[0]
    assert (entry.action, entry.actor) == ("variants.remove", keys["admin"][0].id)

from __future__ import annotations

import pytest
from starlette.requests import Request

from controller.protocol import ErrorEvent, RegisterReply, ServedModel, WorkerStats
from registry.catalog import Catalog
from registry.names import ModelName
from tests.controller.conftest import StartController
from tests.fakes.fake_worker import FakeWorker

JSON = {"content-type": "application/json"}


async def register(controller, message: dict, **headers: str):
    return await controller.post("/internal/workers/register", json=message, headers=headers)


async def error_of(response) -> ErrorEvent:
    return ErrorEvent.model_validate_json(await response.text())


def served(name: str, digest: str | None = None) -> ServedModel:
    return ServedModel(name=name, family="llama", max_model_len=64, chat=True, dtype="fp32", digest=digest)


async def test_register_heartbeat_leave(start_controller: StartController) -> None:
    controller = await start_controller(heartbeat_interval_s=7.0)
    async with FakeWorker() as worker:
        assert (await worker.heartbeat(controller.url)).status == 404
        response = await worker.register(controller.url)
        assert RegisterReply.model_validate_json(await response.text()).heartbeat_interval_s == 7.0
        worker.stats = WorkerStats(num_running=3)
        assert (await worker.heartbeat(controller.url)).status == 200
        (entry,) = controller.state.workers
        assert entry.stats.num_running == 3
        assert (await worker.leave(controller.url)).status == 204
        assert len(controller.state.workers) == 0
        assert (await worker.leave(controller.url)).status == 204


async def test_another_protocol_version_is_named_even_with_unknown_fields(start_controller: StartController) -> None:
    controller = await start_controller()
    response = await register(controller, {"protocol_version": 99, "worker_id": "w", "field_of_tomorrow": 1})
    assert response.status == 400
    error = await error_of(response)
    assert "99" in error.message
    assert error.param == "protocol_version"


@pytest.mark.parametrize(
    "changes",
    [
        {"worker_id": ""},
        {"worker_id": "a b"},
        {"worker_id": "../x"},
        {"models": []},
        {"models": [served("a@prod").model_dump()]},
        {"models": [served("a", digest="md5:1").model_dump()]},
        {"url": "ftp://127.0.0.1:1"},
        {"url": "http://127.0.0.1"},
        {"url": "http://127.0.0.1:1/path"},
        {"url": "http://user@127.0.0.1:1"},
        {"unknown": 1},
    ],
)
async def test_malformed_registrations_are_refused(start_controller: StartController, changes: dict) -> None:
    controller = await start_controller()
    message = {**FakeWorker(url="http://127.0.0.1:1").registration().model_dump(), **changes}
    response = await register(controller, message)
    assert response.status == 400
    assert (await error_of(response)).code == "invalid_request"
    assert len(controller.state.workers) == 0


async def test_bodies_that_a_web_page_could_send_are_refused(start_controller: StartController) -> None:
    controller = await start_controller()
    body = FakeWorker(url="http://127.0.0.1:1").registration().model_dump_json()
    response = await controller.post("/internal/workers/register", data=body, headers={"content-type": "text/plain"})
    assert response.status == 400


async def test_with_a_token_only_those_who_know_it_may_join(start_controller: StartController) -> None:
    controller = await start_controller(worker_token="right")
    async with FakeWorker(token="wrong") as worker:
        for token in (None, "wrong", "r\xe9ght"):
            worker.token = token
            response = await worker.register(controller.url)
            assert response.status == 401
            assert "ROOTGRAFT_WORKER_TOKEN" in (await error_of(response)).message
        worker.token = "right"
        assert (await worker.register(controller.url)).status == 200
        assert (await worker.heartbeat(controller.url)).status == 200
        response = await controller.post(f"/internal/workers/{worker.worker_id}/leave", headers=JSON)
        assert response.status == 401
        assert len(controller.state.workers) == 1


async def test_without_a_token_only_this_machine_may_join(
    start_controller: StartController, monkeypatch: pytest.MonkeyPatch
) -> None:
    controller = await start_controller()
    monkeypatch.setattr(Request, "client", property(lambda self: type("Address", (), {"host": "192.0.2.7"})))
    async with FakeWorker() as worker:
        response = await worker.register(controller.url)
    assert response.status == 403
    assert "ROOTGRAFT_WORKER_TOKEN" in (await error_of(response)).message


async def test_urls_outside_of_the_trusted_networks_are_refused(start_controller: StartController) -> None:
    controller = await start_controller(trusted_workers="10.1.0.0/16")
    async with FakeWorker() as worker:
        response = await worker.register(controller.url)
    assert response.status == 403
    error = await error_of(response)
    assert "127.0.0.1" in error.message
    assert "--trusted-workers" in error.message


async def test_models_with_a_digest_are_recorded_and_keep_what_the_operator_said(
    start_controller: StartController, catalog: Catalog
) -> None:
    digests = [f"sha256:{character * 64}" for character in "abc"]
    catalog.upsert_model("known", family="llama", digest=digests[0], path="/models/known", actor="cli:me")
    controller = await start_controller()
    models = [served("known", digests[1]), served("new", digests[1]), served("anonymous")]
    async with FakeWorker(models=models) as worker:
        assert (await worker.register(controller.url)).status == 200
        assert [model.name for model in controller.state.gateway.models()] == ["anonymous", "known", "new"]
        recorded = {model.name: model for model in catalog.list_models()}
        assert set(recorded) == {"known", "new"}
        assert (recorded["known"].digest, recorded["known"].path) == (digests[0], "/models/known")
        assert recorded["new"].digest == digests[1]
        created = int(recorded["new"].created_at.timestamp())
        assert created == controller.state.gateway.models()[2].created
        worker.models = [served("new", digests[2])]
        assert (await worker.register(controller.url)).status == 200
        assert catalog.get_model("new").digest == digests[2]


async def test_an_alias_of_the_catalog_leads_to_the_worker(start_controller: StartController, catalog: Catalog) -> None:
    digest = f"sha256:{'a' * 64}"
    controller = await start_controller()
    async with FakeWorker(models=[served("m", digest)]) as worker:
        await worker.register(controller.url)
        catalog.set_alias("m", "prod", ModelName("m"), actor="cli:me")
        for name in ("m@prod", f"m@{digest}"):
            response = await controller.post("/v1/completions", json={"model": name, "prompt": "x"})
            assert response.status == 200, await response.text()
        response = await controller.post("/v1/completions", json={"model": "m@other", "prompt": "x"})
        assert response.status == 404
        assert (await response.json())["error"]["code"] == "model_not_found"
    assert [request.model for request in worker.requests] == ["m", "m"]


async def test_a_restarted_controller_knows_the_model_before_its_worker_is_back(
    start_controller: StartController,
) -> None:
    first = await start_controller()
    async with FakeWorker(models=[served("m", f"sha256:{'a' * 64}")]) as worker:
        await worker.register(first.url)
        second = await start_controller()
        request = {"model": "m", "prompt": "x"}
        response = await second.post("/v1/completions", json=request)
        assert (response.status, response.headers["retry-after"]) == (503, "2")
        assert (await worker.heartbeat(second.url)).status == 404
        await worker.register(second.url)
        assert (await second.post("/v1/completions", json=request)).status == 200

from __future__ import annotations

import asyncio
import json

import pytest
from fastapi import FastAPI
from pydantic import BaseModel

from controller.protocol import WorkerStats
from registry.errors import OverloadedError, RateLimitError
from tests.controller.conftest import StartController
from tests.fakes.fake_worker import FakeWorker, Script
from tests.fakes.until import until

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


class Numbers(BaseModel):
    model_config = {"extra": "forbid"}
    values: list[int]


def add_failing_routes(app: FastAPI) -> None:
    @app.get("/v1/bug")
    async def bug() -> None:
        raise RuntimeError("secret detail")

    @app.get("/v1/full")
    async def full() -> None:
        raise RateLimitError("full", retry_after_s=2.2)

    @app.get("/v1/away")
    async def away() -> None:
        raise OverloadedError("away")

    @app.post("/v1/numbers")
    async def numbers(body: Numbers) -> None: ...


async def test_health_is_alive_without_workers(start_controller: StartController) -> None:
    controller = await start_controller()
    response = await controller.get("/health")
    assert (response.status, await response.json()) == (200, {"status": "ok", "workers": 0})


@pytest.mark.parametrize("path", ["/health", "/metrics", "/v1/models", "/v1/models/m", "/openapi.json"])
async def test_probes_may_ask_without_wanting_the_body(start_controller: StartController, path: str) -> None:
    controller = await start_controller()
    async with FakeWorker() as worker:
        await worker.register(controller.url)
        with_body = await controller.get(path)
        response = await controller.head(path)
    assert (response.status, response.content_type) == (200, with_body.content_type)
    assert int(response.headers["content-length"]) > 0


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "error"),
    [
        ("GET", "/nowhere", None, 404, ("invalid_request_error", None, "not_found")),
        ("GET", "/health/", None, 404, ("invalid_request_error", None, "not_found")),
        ("DELETE", "/v1/chat/completions", None, 405, ("invalid_request_error", None, "method_not_allowed")),
        ("GET", "/v1/bug", None, 500, ("server_error", None, "internal_error")),
        ("GET", "/v1/full", None, 429, ("rate_limit_error", None, "rate_limit_exceeded")),
        ("GET", "/v1/away", None, 503, ("overloaded_error", None, "overloaded")),
        ("POST", "/v1/numbers", {"values": [1, "x"]}, 400, ("invalid_request_error", "values[1]", "invalid_request")),
        ("POST", "/v1/numbers", {}, 400, ("invalid_request_error", "values", "invalid_request")),
        ("POST", "/v1/numbers", {"values": [], "z": 1}, 400, ("invalid_request_error", "z", "invalid_request")),
        ("POST", "/v1/numbers", "{", 400, ("invalid_request_error", None, "invalid_request")),
    ],
)
async def test_every_error_has_the_openai_shape(
    start_controller: StartController, method: str, path: str, body: object, status: int, error: tuple
) -> None:
    controller = await start_controller(edit=add_failing_routes)
    data = body if isinstance(body, str) else None if body is None else json.dumps(body)
    headers = {"content-type": "application/json"}
    async with controller.client.request(method, controller.url + path, data=data, headers=headers) as response:
        answer = await response.json()
    assert response.status == status
    assert set(answer) == {"error"}
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert "secret" not in answer["error"]["message"]
    expected_type, param, code = error
    assert (answer["error"]["type"], answer["error"]["param"]) == (expected_type, param)
    assert code is None or answer["error"]["code"] == code
    assert ("retry-after" in response.headers) == (status in (429, 503))
    if path == "/v1/full":
        assert response.headers["retry-after"] == "3"


@pytest.mark.parametrize("path", ["/v1/embeddings", "/chat/completions", "/api/chat", "/"])
async def test_who_asks_for_what_is_not_there_learns_what_is(start_controller: StartController, path: str) -> None:
    controller = await start_controller()
    message = (await (await controller.post(path, json={})).json())["error"]["message"]
    assert message.startswith(f"there is no {path} here; ")
    served = (await (await controller.get("/openapi.json")).json())["paths"]
    named = {word.rstrip(",") for word in message.partition(";")[2].split() if word.startswith("/")} - {"/v1"}
    assert named == {path for path in served if path.startswith(("/v1/", "/tokenize", "/detokenize"))} - {
        "/v1/models/{model_id}", "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
    }  # fmt: skip


async def test_a_request_reaches_the_worker_and_counts_in_the_metrics(start_controller: StartController) -> None:
    controller = await start_controller()
    async with FakeWorker() as worker:
        assert (await worker.register(controller.url)).status == 200
        response = await controller.post("/v1/chat/completions", json=CHAT)
        assert (await response.json())["choices"][0]["message"]["content"] == "Hello world"
        text = await (await controller.get("/metrics")).text()
    labels = 'model="m",route="/v1/chat/completions"'
    assert f'rootgraft_requests_total{{{labels},status="200"}} 1.0' in text
    assert 'rootgraft_completion_tokens_total{model="m"} 2.0' in text
    assert 'rootgraft_prompt_tokens_total{model="m"} 3.0' in text
    assert 'rootgraft_time_to_first_token_seconds_count{model="m"} 1.0' in text
    assert 'rootgraft_inter_token_seconds_count{model="m"} 1.0' in text


async def test_metrics_ask_the_workers_now(start_controller: StartController) -> None:
    controller = await start_controller()
    async with FakeWorker("fresh") as fresh, FakeWorker("slow") as slow, FakeWorker("gone") as gone:
        slow.stats = gone.stats = WorkerStats(kv_blocks_used=7, kv_blocks_total=16)
        for worker in (fresh, slow, gone):
            await worker.register(controller.url)
        fresh.stats = WorkerStats(kv_blocks_used=5, kv_blocks_total=16, num_running=2, prefix_hit_tokens_total=9)
        slow.stats = WorkerStats(kv_blocks_used=1, kv_blocks_total=16)
        slow.stats_delay_s = 60.0
        await gone.kill()
        response = await controller.get("/metrics")
        text = await response.text()
    assert response.content_type == "text/plain"
    assert 'rootgraft_worker_kv_blocks_used{worker="fresh"} 5.0' in text
    assert 'rootgraft_worker_kv_blocks_used{worker="slow"} 7.0' in text  # of its last heartbeat
    assert 'rootgraft_worker_kv_blocks_used{worker="gone"} 7.0' in text
    assert 'rootgraft_worker_requests_running{worker="fresh"} 2.0' in text
    assert 'rootgraft_worker_prefix_hit_tokens_total{worker="fresh"} 9.0' in text
    assert 'rootgraft_workers{state="ready"} 3.0' in text
    assert 'rootgraft_worker_serves{model="m",worker="slow"} 1.0' in text


async def test_admin_lists_the_workers(start_controller: StartController) -> None:
    controller = await start_controller()
    async with FakeWorker("w1", Script(hang_after=0)) as worker:
        await worker.register(controller.url)
        request = asyncio.create_task(controller.post("/v1/chat/completions", json=CHAT))
        (entry,) = controller.state.workers
        await until(lambda: entry.num_in_flight)
        (listed,) = (await (await controller.get("/admin/workers")).json())["workers"]
        request.cancel()
    assert (listed["worker_id"], listed["url"], listed["state"]) == ("w1", worker.url, "ready")
    assert listed["models"][0]["name"] == "m"
    assert listed["stats"]["kv_blocks_total"] == 16
    assert listed["num_in_flight"] == 1
    assert listed["last_heartbeat_age_s"] >= 0


async def test_a_worker_without_heartbeats_is_forgotten_and_its_streams_end(start_controller: StartController) -> None:
    controller = await start_controller(heartbeat_interval_s=0.1, missed_heartbeats=2)
    async with FakeWorker("w1", Script(hang_after=1)) as worker:
        await worker.register(controller.url)
        response = await controller.post("/v1/chat/completions", json={**CHAT, "stream": True})
        last = (await response.text()).strip().splitlines()[-1]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "worker_failed"
        assert (await (await controller.get("/health")).json())["workers"] == 0
        response = await controller.post("/v1/chat/completions", json=CHAT)
        assert response.status == 503  # the model is known, nobody serves it now
        assert (await worker.heartbeat(controller.url)).status == 404
        assert (await worker.register(controller.url)).status == 200


async def test_a_client_that_goes_away_cancels_on_the_worker(start_controller: StartController) -> None:
    controller = await start_controller()
    async with FakeWorker("w1", Script(hang_after=1)) as worker:
        await worker.register(controller.url)
        request = controller.client.post(controller.url + "/v1/chat/completions", json={**CHAT, "stream": True})
        async with request as response:
            await response.content.readline()
        await until(lambda: worker.cancelled)
        (entry,) = controller.state.workers
        await until(lambda: not entry.num_in_flight)


async def test_stopping_ends_streams_with_an_error_event(start_controller: StartController) -> None:
    controller = await start_controller(shutdown_timeout_s=0.2)
    async with FakeWorker("w1", Script(hang_after=1)) as worker:
        await worker.register(controller.url)
        request = controller.client.post(controller.url + "/v1/chat/completions", json={**CHAT, "stream": True})
        async with request as response:
            await response.content.readline()
            controller.server.should_exit = True
            rest = (await response.content.read()).decode().strip().splitlines()
        assert json.loads(rest[-1].removeprefix("data: "))["error"]["code"] == "overloaded"
        assert "data: [DONE]" not in rest


async def test_stopping_outlasts_the_heartbeats_that_can_no_longer_arrive(start_controller: StartController) -> None:
    controller = await start_controller(shutdown_timeout_s=30.0, heartbeat_interval_s=1.0, missed_heartbeats=1)
    async with FakeWorker("w1", Script(deltas=("a",) * 20, delay_s=0.1)) as worker:  # two seconds, expiry is one
        await worker.register(controller.url)
        request = controller.client.post(controller.url + "/v1/chat/completions", json={**CHAT, "stream": True})
        async with request as response:
            await response.content.readline()
            controller.server.should_exit = True
            rest = (await response.content.read()).decode().strip().splitlines()
    assert rest[-1] == "data: [DONE]"

"""Publishing against fake workers over HTTP: versions, aliases, canaries and shadows as clients see them."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from controller.protocol import ErrorEvent
from registry.catalog import Catalog
from registry.published_files import PublishedFiles
from registry.store import Store
from tests.controller.conftest import RunningController, StartController
from tests.fakes.fake_variants import FakeVariants, VariantRefused
from tests.fakes.fake_worker import FakeWorker, Script
from tests.fakes.stored_blobs import put
from tests.fakes.until import until

CHAT = {"model": "bot", "messages": [{"role": "user", "content": "hi"}], "temperature": 0}


@dataclass(frozen=True, slots=True)
class Publishing:
    """A controller with a store and two workers of the model m."""

    controller: RunningController
    store: Store
    workers: tuple[FakeWorker, FakeWorker]

    def put(self, text: str) -> dict[str, str]:
        """The files of a LoRA adapter, in the store, and where workers can read them."""
        digests = {name: put(self.store, f"{name} {text}".encode()).digest for name in
                   ("adapter_config.json", "adapter_model.safetensors")}  # fmt: skip
        digest = f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"
        for worker in self.workers:
            worker.variants.files[PublishedFiles(digests).manifest_digest] = digest
        return digests

    async def call(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        response = await self.controller._request(
            method, f"/admin/releases{path}", {} if body is None else {"json": body}
        )
        return response.status, await response.json() if response.content_type == "application/json" else None

    async def publish(self, text: str) -> dict[str, Any]:
        """A version, once it is ready or has failed."""
        status, version = await self.call("POST", "/bot/versions", {"files": self.put(text), "parent": "m"})
        assert status == 200, version
        while version["state"] == "rolling_out":
            await asyncio.sleep(0.02)
            version = (await self.call("GET", f"/bot/versions/{version['number']}"))[1]["version"]
        return dict(version)

    async def point(self, number: int) -> tuple[int, Any]:
        return await self.call("PUT", "/bot/aliases/prod", {"version": number})

    async def chat(self, **changes: Any) -> int:
        return (await self.controller.post("/v1/chat/completions", json={**CHAT, **changes})).status

    def asked(self) -> Counter[str]:
        """The requests of each variant that have come to the workers."""
        return Counter(lora.name for worker in self.workers for request in worker.requests for lora in request.loras)


@pytest.fixture
async def publishing(start_controller: StartController, tmp_path: Path) -> AsyncIterator[Publishing]:
    controller = await start_controller(
        heartbeat_interval_s=60.0, store=str(tmp_path / "store"), canary_min_requests=5, canary_error_margin=0.1
    )
    async with (
        FakeWorker("w1", variants=FakeVariants()) as first,
        FakeWorker("w2", variants=FakeVariants()) as second,
    ):
        for worker in (first, second):
            assert (await worker.register(controller.url)).status == 200
        yield Publishing(controller, Store(tmp_path / "store"), (first, second))


async def test_from_files_to_answers_and_back(publishing: Publishing, catalog: Catalog) -> None:
    first = await publishing.publish("one")
    assert (first["name"], first["state"], first["kind"], first["parent"]) == ("bot@v1", "ready", "lora", "m")
    assert await publishing.chat() == 404  # no alias yet
    assert await publishing.chat(model="bot@v1") == 200
    assert (await publishing.point(1))[0] == 200
    assert [await publishing.chat(model=name) for name in ("bot", "bot@prod")] == [200, 200]
    assert publishing.asked() == {"bot@v1": 3}
    again = await publishing.publish("one")
    assert again["number"] == 1
    assert (await publishing.publish("two"))["number"] == 2
    await publishing.point(2)
    await publishing.chat()
    status, alias = await publishing.call("POST", "/bot/aliases/prod/rollback")
    assert (status, alias["version"]) == (200, 1)
    await publishing.chat()
    assert publishing.asked() == {"bot@v1": 4, "bot@v2": 1}
    moves = (await publishing.call("GET", "/bot/aliases/prod/history"))[1]["moves"]
    assert [(move["actor"], move["detail"]["from"], move["detail"]["to"]) for move in moves] == [
        ("api", "bot@v2", "bot@v1"), ("api", "bot@v1", "bot@v2"), ("api", None, "bot@v1"),
    ]  # fmt: skip
    listed = (await (await publishing.controller.get("/v1/models")).json())["data"]
    assert [(model["id"], model["root"], model["parent"]) for model in listed] == [
        ("m", "m", None), ("bot", "bot@v1", "m"),
    ]  # fmt: skip
    for name in ("bot", "bot@prod", "bot@v2", "m"):
        model = await (await publishing.controller.get(f"/v1/models/{name}")).json()
        assert (model["id"], model["parent"]) == (name, None if name == "m" else "m")
    assert (await publishing.controller.get("/v1/models/bot@staging")).status == 404
    status, answer = await publishing.call("DELETE", "/bot/versions/1")
    assert (status, "used by the alias bot@prod" in answer["error"]["message"]) == (400, True)
    assert (await publishing.call("DELETE", "/bot/versions/2"))[0] == 200
    assert [version.number for version in catalog.get_release("bot").versions] == [1]


async def test_what_cannot_become_a_version(publishing: Publishing) -> None:
    files = publishing.put("one")
    absent = {**files, "adapter_model.safetensors": "sha256:" + "0" * 64}
    for body, reason in (
        ({"files": absent}, "is not in the store; upload it first"),
        ({"files": {"x": "sha256:" + "0" * 64}}, "no fine-tune"),
        ({"files": files, "parent": "unknown"}, "is not served"),
        ({"files": files, "base_digest": "sha256:" + "1" * 64}, "0 models with the digest"),
    ):
        status, answer = await publishing.call("POST", "/bot/versions", body)
        assert 400 <= status < 500
        assert reason in answer["error"]["message"]
    status, answer = await publishing.call("POST", "/m/versions", {"files": files})
    assert "is the name of a model" in answer["error"]["message"]


async def test_a_version_can_be_made_while_its_workers_are_away(
    start_controller: StartController, tmp_path: Path
) -> None:
    """As after a restart of the controller, when they have not come back yet."""
    controller = await start_controller(store=str(tmp_path / "store"))
    base, files = "sha256:" + "5" * 64, {"adapter_config.json": put(Store(tmp_path / "store"), b"{}").digest}
    controller.state.catalog.upsert_model("m", family="llama", digest=base, path="", actor="worker:w1")
    for body in ({"base_digest": base}, {"parent": "m"}):
        response = await controller.post("/admin/releases/bot/versions", json={"files": files, **body})
        version = await response.json()
        assert (version["name"], version["parent"], version["state"]) == ("bot@v1", "m", "rolling_out")


async def test_a_version_that_no_worker_can_read_never_gets_the_alias(publishing: Publishing) -> None:
    await publishing.publish("one")
    await publishing.point(1)
    refused = VariantRefused(400, "checkpoint_invalid", "values are not finite")
    for worker in publishing.workers:
        worker.variants.refuse["add bot@v2"] = refused
    failed = await publishing.publish("two")
    assert failed["state"] == "failed"
    assert failed["error"] == (
        "worker w1: values are not finite (checkpoint_invalid); worker w2: values are not finite (checkpoint_invalid)"
    )
    status, answer = await publishing.point(2)
    assert (status, "bot@v2 has failed" in answer["error"]["message"]) == (400, True)
    assert await publishing.chat() == 200
    assert publishing.asked() == {"bot@v1": 1}
    for worker in publishing.workers:
        worker.variants.refuse.clear()
    assert (await publishing.publish("two"))["state"] == "ready"


async def test_one_failed_probe_is_enough_but_one_full_worker_is_not(publishing: Publishing) -> None:
    second = publishing.workers[1]
    second.variants.refuse["add bot@v1"] = VariantRefused(400, "probe_failed", "it answers otherwise")
    assert (await publishing.publish("one"))["error"] == "worker w2: it answers otherwise (probe_failed)"
    second.variants.refuse["add bot@v2"] = VariantRefused(400, "insufficient_memory", "no room")
    version = await publishing.publish("two")
    assert version["state"] == "ready"
    on = (await publishing.call("GET", "/bot/versions/2"))[1]["workers"]
    assert [(worker["usable"], worker["error"] and worker["error"]["message"]) for worker in on] == [
        (True, None), (False, "no room"),
    ]  # fmt: skip


async def with_canary(publishing: Publishing, weight: float) -> None:
    for text in ("one", "two"):
        await publishing.publish(text)
    await publishing.point(1)
    status, _ = await publishing.call("PUT", "/bot/aliases/prod/canary", {"version": 2, "weight": weight})
    assert status == 200


async def test_a_canary_is_sticky_for_users_and_conversations(publishing: Publishing) -> None:
    await with_canary(publishing, 0.5)
    for user in range(20):
        assert await publishing.chat(user=f"user {user}") == 200
    first = publishing.asked()
    assert set(first) == {"bot@v1", "bot@v2"}
    for user in range(20):
        await publishing.chat(user=f"user {user}")
    assert publishing.asked() == Counter({name: 2 * count for name, count in first.items()})
    turns = [{"role": "user", "content": f"start {i}"} for i in range(8)]
    for turn in turns:
        before = publishing.asked()
        await publishing.chat(messages=[turn])
        got = publishing.asked() - before
        await publishing.chat(messages=[turn, {"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}])
        assert publishing.asked() - before == Counter(dict.fromkeys(got, 2))


async def test_a_canary_that_fails_harms_nobody_and_is_aborted(publishing: Publishing, catalog: Catalog) -> None:
    await with_canary(publishing, 1.0)
    # Each request comes first to the canary on up to two workers, which refuse, and then to the stable version.
    refuse = Script(refuse=ErrorEvent(code="internal_error", message="boom"), refuse_status=500)
    for _ in range(6):
        for worker in publishing.workers:
            worker.scripts = [refuse]
        assert await publishing.chat() == 200
    gone = 'rootgraft_release_weight{alias="prod",release="bot",role="canary",version="v2"} 0.0'
    for _ in range(1000):
        if gone in await (await publishing.controller.get("/metrics")).text():
            break
        await asyncio.sleep(0.02)
    newest = catalog.alias_history("bot", "prod")[0]
    assert (newest.action, newest.actor) == ("aliases.canary_abort", "controller")
    assert "of its" in newest.detail["reason"]
    before = publishing.asked()["bot@v2"]
    assert await publishing.chat() == 200
    assert publishing.asked()["bot@v2"] == before
    metrics = await (await publishing.controller.get("/metrics")).text()
    assert gone in metrics
    assert 'outcome="failed",release="bot",role="canary",version="v2"' in metrics


async def test_a_shadow_is_asked_the_same_and_compared(publishing: Publishing) -> None:
    for text in ("one", "two"):
        await publishing.publish(text)
    await publishing.point(1)
    assert (await publishing.call("PUT", "/bot/aliases/prod/shadow", {"version": 2}))[0] == 200
    assert await publishing.chat() == 200
    counts = publishing.controller.state.release_counts
    await until(lambda: counts.shadows)
    assert counts.shadows == {("bot", 2, "agrees"): 1}
    assert publishing.asked() == {"bot@v1": 1, "bot@v2": 1}
    assert await publishing.chat(temperature=1) == 200
    await until(lambda: len(counts.shadows) == 2)
    assert counts.shadows["bot", 2, "sampled"] == 1


async def test_another_controller_goes_on_where_one_was_killed(
    publishing: Publishing, start_controller: StartController, tmp_path: Path
) -> None:
    await publishing.publish("one")
    await publishing.point(1)
    for worker in publishing.workers:
        worker.variants.hold = asyncio.Event()
    files = publishing.put("two")
    assert (await publishing.call("POST", "/bot/versions", {"files": files}))[1]["state"] == "rolling_out"
    other = await start_controller(heartbeat_interval_s=60.0, store=str(tmp_path / "store"))
    for worker in publishing.workers:
        assert worker.variants.hold is not None
        worker.variants.hold.set()
        assert (await worker.register(other.url)).status == 200
    again = Publishing(other, publishing.store, publishing.workers)
    assert await again.chat() == 200
    assert (await again.publish("two"))["state"] == "ready"
    assert (await again.point(2))[0] == 200


async def test_files_of_no_version_go_with_the_next_one_that_is_removed(publishing: Publishing) -> None:
    for text in ("one", "two"):
        await publishing.publish(text)
    kept = set(publishing.put("two").values())
    assert (await publishing.call("DELETE", "/bot/versions/1"))[0] == 200
    assert len(list(publishing.store.blobs())) == 4  # they are too new: somebody may be about to use them
    for blob in publishing.store.blobs():
        os.utime(blob.path, (0, 0))
    await publishing.publish("three")
    assert (await publishing.call("DELETE", "/bot/versions/3"))[0] == 200
    assert {blob.digest for blob in publishing.store.blobs()} >= kept
    assert len(list(publishing.store.blobs())) == 4  # those of two, and of three, which are new

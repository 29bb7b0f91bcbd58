"""Publishing with the real processes: versions answer under their name; whoever is killed, the old one goes on."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from tests.e2e.processes import Cluster, Process, wait_until
from tests.fakes.peft_adapters import make_adapter

pytestmark = pytest.mark.e2e

PUBLISH_S = 120.0
NAMES = ("one", "two", "three", "four")


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory, smollm2_dir: Path) -> Path:
    root = tmp_path_factory.mktemp("adapters")
    base = AutoModelForCausalLM.from_pretrained(smollm2_dir, dtype=torch.float32).eval()
    for seed, name in enumerate(NAMES):
        make_adapter(base, LoraConfig(r=8, lora_alpha=1, target_modules="all-linear"), root / name, seed=seed)
    return root


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory, smollm2_dir: Path, adapters: Path) -> Iterator[Cluster]:
    """A controller and a worker, and the first version of bot."""
    cluster = Cluster(tmp_path_factory.mktemp("publishing"), smollm2_dir)
    try:
        start_controller(cluster)
        cluster.start_worker()
        assert publisher(cluster, adapters / "one").popen.wait(PUBLISH_S) == 0
        yield cluster
    finally:
        cluster.stop()


def start_controller(cluster: Cluster) -> None:
    cluster.start_controller("--store", str(cluster.directory / "store"))


def publisher(cluster: Cluster, adapter: Path, *arguments: str) -> Process:
    log = cluster.directory / f"publish-{adapter.name}.log"
    return Process(
        log, "delta", "publish", "--name", "bot", "--adapter", str(adapter), "--url", cluster.url, *arguments
    )


def ask(cluster: Cluster, model: str = "bot") -> requests.Response:
    body = {"model": model, "prompt": "The river runs through", "max_tokens": 4, "temperature": 0}
    return requests.post(f"{cluster.url}/v1/completions", json=body, timeout=120)


def answer(cluster: Cluster, model: str = "bot") -> str:
    reply = ask(cluster, model)
    assert reply.status_code == 200, reply.text
    return str(reply.json()["choices"][0]["text"])


def release(cluster: Cluster) -> dict[str, Any]:
    reply = cluster.get("/admin/releases/bot")
    return {} if reply is None or reply.status_code != 200 else dict(reply.json())


def points_to(cluster: Cluster) -> int | None:
    return next((alias["version"] for alias in release(cluster).get("aliases", ())), None)


def test_a_published_version_answers_under_its_name(serving: Cluster) -> None:
    assert points_to(serving) == 1
    assert answer(serving) == answer(serving, "bot@v1") == answer(serving, "bot@prod")
    version = release(serving)["versions"][0]
    assert answer(serving, f"bot@{version['digest']}") == answer(serving)
    models = serving.get("/v1/models")
    assert models is not None
    assert {model["id"]: model["root"] for model in models.json()["data"]}["bot"] == "bot@v1"


def test_a_killed_publisher_is_simply_started_again(serving: Cluster, adapters: Path) -> None:
    before = answer(serving)
    for word in ("uploading", "is version"):
        killed = publisher(serving, adapters / "two")
        wait_until(lambda word=word, killed=killed: word in killed.text() or killed.popen.poll() is not None, 60, word)  # type: ignore[misc]
        killed.kill()
    assert answer(serving, "bot@v1") == before
    again = publisher(serving, adapters / "two")
    assert again.popen.wait(PUBLISH_S) == 0, again.text()
    assert len(release(serving)["versions"]) == points_to(serving) == 2


def test_a_killed_controller_and_a_killed_worker_lose_nothing(serving: Cluster, adapters: Path) -> None:
    before, current = answer(serving), points_to(serving)
    waiting = publisher(serving, adapters / "three", "--timeout", "300")
    wait_until(lambda: "uploading" in waiting.text(), 60, "the upload")
    assert serving.controller is not None
    serving.controller.kill()
    serving.workers.pop().kill()
    start_controller(serving)
    assert points_to(serving) == current
    serving.start_worker()
    wait_until(lambda: ask(serving, f"bot@v{current}").status_code == 200, 60, "the old version")
    assert answer(serving, f"bot@v{current}") == before
    if waiting.popen.wait(PUBLISH_S) != 0:  # it gives up when the controller is away for longer than its tries
        assert publisher(serving, adapters / "three").popen.wait(PUBLISH_S) == 0
    assert points_to(serving) == 3


def test_rolling_back_and_forth_under_load_loses_no_request(serving: Cluster) -> None:
    stop = threading.Event()
    statuses: list[int] = []

    def load() -> None:
        while not stop.is_set():
            statuses.append(ask(serving).status_code)

    threads = [threading.Thread(target=load) for _ in range(4)]
    for thread in threads:
        thread.start()
    aliases = f"{serving.url}/admin/releases/bot/aliases/prod"
    for _ in range(4):
        assert requests.post(f"{aliases}/rollback", timeout=30).json()["version"] == 2
        assert requests.put(aliases, json={"version": 3}, timeout=30).json()["version"] == 3
    stop.set()
    for thread in threads:
        thread.join()
    assert set(statuses) == {200}


def test_a_bad_adapter_never_gets_the_alias(serving: Cluster, adapters: Path) -> None:
    weights = adapters / "four" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    current = points_to(serving)
    failed = publisher(serving, adapters / "four")
    assert failed.popen.wait(PUBLISH_S) == 1
    assert "cannot be served" in failed.text()
    assert points_to(serving) == current
    assert answer(serving) == answer(serving, f"bot@v{current}")


def test_operators_see_and_move_releases(serving: Cluster) -> None:
    def releases(*arguments: str) -> str:
        command = [sys.executable, "-m", "controller", "releases", *arguments, "--database", serving.database]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout

    assert releases("list").startswith("bot  4 versions  bot@prod -> bot@v3")
    assert "bot@v4  lora  failed" in releases("show", "bot")
    assert releases("alias", "bot", "v1") == "bot@prod -> bot@v1\n"
    wait_until(lambda: points_to(serving) == 1, 60, "the alias moved")
    assert releases("rollback", "bot") == "bot@prod -> bot@v3\n"
    assert "rollback  bot@v1 -> bot@v3" in releases("history", "bot")

"""Real processes killed with SIGKILL while they serve."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
import requests

from tests.e2e.processes import MODEL, Cluster, wait_until

pytestmark = pytest.mark.e2e


def make_client(cluster: Cluster) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{cluster.url}/v1", api_key="none", max_retries=0, timeout=120)


class Reader(threading.Thread):
    """Reads one long stream and records when its first chunk, its end and its error came."""

    def __init__(self, client: openai.OpenAI, max_tokens: int) -> None:
        super().__init__(daemon=True)
        self.client = client
        self.max_tokens = max_tokens
        self.first_at: float | None = None
        self.ended_at: float | None = None
        self.error: Exception | None = None
        self.finish_reason: str | None = None

    def run(self) -> None:
        try:
            stream = self.client.completions.create(
                model=MODEL, prompt="Once upon a time", max_tokens=self.max_tokens, temperature=0, stream=True,
                extra_body={"ignore_eos": True},
            )  # fmt: skip
            for chunk in stream:
                self.first_at = self.first_at or time.monotonic()
                if chunk.choices:
                    self.finish_reason = chunk.choices[0].finish_reason or self.finish_reason
        except openai.OpenAIError as error:
            self.error = error
        self.ended_at = time.monotonic()


def test_a_replica_killed_under_sixteen_streams(cluster: Cluster) -> None:
    cluster.start_controller()
    victim = cluster.start_worker()
    cluster.start_worker()
    client = make_client(cluster)
    streaming = [Reader(client, max_tokens=200) for _ in range(16)]
    for reader in streaming:
        reader.start()
    wait_until(lambda: all(reader.first_at for reader in streaming), 60, "sixteen streams")
    victim.kill()
    killed_at = time.monotonic()
    # Requests that come now, before the controller can know, must succeed on the other replica.
    with ThreadPoolExecutor(4) as pool:
        later = list(pool.map(lambda _: client.completions.create(model=MODEL, prompt="Hello", max_tokens=4), range(4)))
    assert all(reply.choices[0].finish_reason in ("length", "stop") for reply in later)
    for reader in streaming:
        reader.join(300)
    broken = [reader for reader in streaming if reader.error is not None]
    whole = [reader for reader in streaming if reader.error is None]
    assert broken, "the killed worker had streams"
    assert whole, "the other worker had streams"
    for reader in broken:
        assert isinstance(reader.error, openai.APIError)
        assert reader.ended_at is not None
        assert reader.ended_at - killed_at < 30
    assert {reader.finish_reason for reader in whole} == {"length"}
    wait_until(lambda: cluster.num_workers() == 1, 60, "the dead worker forgotten")


def test_a_killed_controller_comes_back_with_its_workers_and_its_catalog(cluster: Cluster) -> None:
    controller = cluster.start_controller()
    cluster.start_worker()
    before = requests.get(f"{cluster.url}/v1/models", timeout=60).json()
    controller.kill()
    cluster.start_controller()
    cluster.wait_for_workers(1)
    after = requests.get(f"{cluster.url}/v1/models", timeout=60).json()
    assert [model["id"] for model in after["data"]] == [model["id"] for model in before["data"]]
    reply = make_client(cluster).completions.create(model=MODEL, prompt="Hello", max_tokens=4)
    assert reply.choices[0].finish_reason == "length"


def test_a_draining_worker_finishes_what_runs_and_takes_nothing_new(cluster: Cluster) -> None:
    cluster.start_controller()
    worker = cluster.start_worker()
    reader = Reader(make_client(cluster), max_tokens=120)
    reader.start()
    wait_until(lambda: reader.first_at, 60, "the stream")
    statuses: list[int] = []
    stopper = threading.Thread(target=lambda: statuses.append(worker.stop(300)))
    stopper.start()
    wait_until(lambda: cluster.num_workers() == 0, 60, "the worker off the list")
    with pytest.raises(openai.APIStatusError) as refused:
        make_client(cluster).completions.create(model=MODEL, prompt="Hello", max_tokens=4)
    assert refused.value.status_code == 503
    assert "retry-after" in refused.value.response.headers
    reader.join(300)
    stopper.join(300)
    assert reader.error is None
    assert reader.finish_reason == "length"
    assert statuses == [0]


def test_a_model_that_cannot_be_loaded_is_one_line_and_a_status(cluster: Cluster) -> None:
    cluster.model = cluster.directory / "absent"
    cluster.start_controller()
    worker = cluster.start_worker(wait=False)
    assert worker.popen.wait(60) == 1
    lines = worker.text().strip().splitlines()
    assert len(lines) == 1
    assert "absent" in lines[0]

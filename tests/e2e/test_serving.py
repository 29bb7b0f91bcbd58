"""The real processes on the small real model, used through the official client."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest

from tests.e2e.processes import MODEL, Cluster, wait_until

pytestmark = pytest.mark.e2e

WORDS = [
    "river",
    "stone",
    "lamp",
    "cloud",
    "paper",
    "engine",
    "garden",
    "window",
    "silver",
    "forest",
    "number",
    "market",
]


def prompt(number: int) -> str:
    """A short prompt of its own for each number."""
    return " ".join(WORDS[(number * 7 + i * (number % 4 + 1)) % len(WORDS)] for i in range(12 + number % 9))


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory, smollm2_dir: Any) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path_factory.mktemp("serving"), smollm2_dir)
    try:
        cluster.start_controller()
        cluster.start_worker()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture(scope="module")
def client(serving: Cluster) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{serving.url}/v1", api_key="none", max_retries=0, timeout=120)


def complete(client: openai.OpenAI, text: str, max_tokens: int) -> str:
    reply = client.completions.create(
        model=MODEL, prompt=text, max_tokens=max_tokens, temperature=0, extra_body={"ignore_eos": True}
    )
    return reply.choices[0].text


def test_greedy_answers_are_those_of_the_reference(
    client: openai.OpenAI, smollm2_greedy: dict[str, dict[str, Any]]
) -> None:
    for question, expected in smollm2_greedy.items():
        stream = client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": question}],
            temperature=0,
            max_tokens=60,
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = list(stream)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        assert text == expected["text"].removesuffix("<|im_end|>")
        usage = chunks[-1].usage
        assert usage is not None
        assert usage.prompt_tokens == expected["prompt_len"]
        assert usage.completion_tokens == len(expected["ids"])


def test_thirty_two_streams_at_once_give_what_each_gives_alone(serving: Cluster, client: openai.OpenAI) -> None:
    alone = [complete(client, prompt(i), 24) for i in range(32)]
    with ThreadPoolExecutor(32) as pool:
        together = list(pool.map(lambda i: complete(client, prompt(i), 24), range(32)))
    assert together == alone
    wait_until(lambda: serving.metric("rootgraft_worker_kv_blocks_used") == 0, 60, "blocks given back")


def test_a_client_that_disconnects_frees_its_blocks(serving: Cluster, client: openai.OpenAI) -> None:
    cancelled = serving.metric("rootgraft_worker_requests_cancelled_total")
    stream = client.completions.create(
        model=MODEL, prompt=prompt(3), max_tokens=4000, temperature=0, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    assert serving.metric("rootgraft_worker_kv_blocks_used") > 0
    stream.close()
    wait_until(lambda: serving.metric("rootgraft_worker_kv_blocks_used") == 0, 60, "blocks given back")
    assert serving.metric("rootgraft_worker_requests_cancelled_total") == cancelled + 1


def test_the_same_seed_gives_the_same_text_whatever_else_runs(client: openai.OpenAI) -> None:
    def sample(_: int) -> str:
        reply = client.completions.create(model=MODEL, prompt=prompt(5), max_tokens=30, temperature=0.9, seed=11)
        return reply.choices[0].text

    alone = sample(0)
    with ThreadPoolExecutor(8) as pool:
        others = [pool.submit(complete, client, prompt(i), 30) for i in range(6)]
        assert list(pool.map(sample, range(2))) == [alone, alone]
        for other in others:
            other.result()


def test_few_blocks_mean_preemption_and_the_same_text(
    serving: Cluster, client: openai.OpenAI, cluster: Cluster
) -> None:
    def run(client: openai.OpenAI) -> list[str]:
        with ThreadPoolExecutor(16) as pool:
            return list(pool.map(lambda i: complete(client, prompt(i), 100), range(16)))

    roomy = run(client)
    assert serving.metric("rootgraft_worker_preemptions_total") == 0
    cluster.start_controller()
    cluster.start_worker("--num-blocks", "64")
    assert run(openai.OpenAI(base_url=f"{cluster.url}/v1", api_key="none", max_retries=0, timeout=240)) == roomy
    assert cluster.metric("rootgraft_worker_preemptions_total") > 0
    wait_until(lambda: cluster.metric("rootgraft_worker_kv_blocks_used") == 0, 60, "blocks given back")

"""The small real model divided among the three processes of one worker."""

from __future__ import annotations

import threading
from typing import Any

import psutil
import pytest
import requests

from tests.e2e.processes import MODEL, Cluster, wait_until

pytestmark = pytest.mark.e2e

QUESTION = "What is the capital of France?"


def test_three_ranks_answer_as_one_and_end_together(
    cluster: Cluster, smollm2_greedy: dict[str, dict[str, Any]]
) -> None:
    cluster.start_controller()
    worker = cluster.start_worker("--tensor-parallel-size", "3", "--kv-cache-gib", "0.1")
    expected = smollm2_greedy[QUESTION]["text"].removesuffix("<|im_end|>")
    assert _ask(cluster, QUESTION, max_tokens=20)["choices"][0]["message"]["content"] == expected

    ranks = psutil.Process(worker.popen.pid).children()
    assert len(ranks) == 2
    errors: list[Any] = []
    asking = threading.Thread(target=lambda: errors.append(_ask(cluster, "Count to a thousand.", max_tokens=2000)))
    asking.start()
    wait_until(lambda: cluster.metric("rootgraft_worker_requests_running") > 0, 60, "a request that runs")
    ranks[0].kill()
    asking.join(60)
    assert "error" in errors[0]
    assert worker.popen.wait(60) == 1
    assert "Rank 1 of this model was killed by signal 9" in worker.text()
    wait_until(lambda: not any(rank.is_running() for rank in ranks), 60, "the end of all ranks")


def _ask(cluster: Cluster, question: str, *, max_tokens: int) -> Any:
    reply = requests.post(
        f"{cluster.url}/v1/chat/completions",
        json={
            "model": MODEL,
            "messages": [{"role": "user", "content": question}],
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": max_tokens > 100,
        },
        timeout=300,
    )
    return reply.json()

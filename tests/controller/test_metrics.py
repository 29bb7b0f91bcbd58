from __future__ import annotations

import asyncio

import pytest

from controller.metrics import Metrics
from controller.protocol import ServedModel, WorkerStats
from controller.scrape import WorkerCollector
from controller.workers import Worker
from registry.errors import RateLimitError

ROUTE = "/v1/chat/completions"


class Clock:
    now = 10.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def metrics(clock: Clock) -> Metrics:
    return Metrics(clock)


def value(metrics: Metrics, sample: str) -> float | None:
    for line in metrics.render().decode().splitlines():
        name, _, number = line.rpartition(" ")
        if name == sample:
            return float(number)
    return None


def test_a_streamed_request(metrics: Metrics, clock: Clock) -> None:
    with metrics.start_request(ROUTE) as observer:
        assert value(metrics, f'rootgraft_requests_in_flight{{route="{ROUTE}"}}') == 1
        observer.set_model("m")
        observer.delta(0, 0)  # no token, no time
        clock.now += 0.5
        observer.delta(0, 1)
        clock.now += 0.25
        observer.delta(1, 1)  # the first token of another choice is neither
        clock.now += 0.75
        observer.delta(0, 4)
        observer.done(7)
        clock.now += 0.5
        observer.finish(200)
    assert value(metrics, f'rootgraft_requests_in_flight{{route="{ROUTE}"}}') == 0
    assert value(metrics, f'rootgraft_requests_total{{model="m",route="{ROUTE}",status="200"}}') == 1
    assert value(metrics, 'rootgraft_time_to_first_token_seconds_sum{model="m"}') == 0.5
    assert value(metrics, 'rootgraft_time_to_first_token_seconds_count{model="m"}') == 1
    assert value(metrics, 'rootgraft_inter_token_seconds_sum{model="m"}') == 0.25  # 1 s, four tokens together
    assert value(metrics, 'rootgraft_inter_token_seconds_count{model="m"}') == 1
    assert value(metrics, f'rootgraft_request_seconds_sum{{model="m",route="{ROUTE}"}}') == 2.0
    assert value(metrics, 'rootgraft_prompt_tokens_total{model="m"}') == 7
    assert value(metrics, 'rootgraft_completion_tokens_total{model="m"}') == 6


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (RateLimitError("full"), 429),
        (RuntimeError(), 500),
        (asyncio.CancelledError(), 499),
        (GeneratorExit(), 499),
        (None, 200),
    ],
)
def test_what_a_request_counts_as(metrics: Metrics, error: BaseException | None, status: int) -> None:
    def run() -> None:
        with metrics.start_request(ROUTE):
            if error is not None:
                raise error

    if error is None:
        run()
    else:
        with pytest.raises(type(error)):
            run()
    assert value(metrics, f'rootgraft_requests_total{{model="",route="{ROUTE}",status="{status}"}}') == 1
    assert value(metrics, f'rootgraft_requests_in_flight{{route="{ROUTE}"}}') == 0


def test_a_request_counts_once(metrics: Metrics) -> None:
    with metrics.start_request(ROUTE) as observer:
        observer.finish(502)
        observer.finish(200)
    assert value(metrics, f'rootgraft_requests_total{{model="",route="{ROUTE}",status="502"}}') == 1
    assert value(metrics, f'rootgraft_requests_total{{model="",route="{ROUTE}",status="200"}}') is None


def test_two_controllers_do_not_share_metrics(metrics: Metrics) -> None:
    with Metrics().start_request(ROUTE):
        pass
    assert value(metrics, f'rootgraft_requests_in_flight{{route="{ROUTE}"}}') is None


def test_workers_are_labelled_and_left_out_when_they_are_gone(metrics: Metrics) -> None:
    model = ServedModel(name='odd"name', family="llama", max_model_len=1, chat=False, dtype="fp32")
    draining = WorkerStats(
        draining=True, preemptions_total=3, kv_blocks_used=2, draft_tokens_total=8, accepted_draft_tokens_total=6
    )
    workers = [
        Worker("a", "http://a:1", (model,), draining, 0.0),
        Worker("b", "http://b:1", (model,), WorkerStats(), 0.0, suspect=True),
    ]
    text = metrics.render(WorkerCollector([(worker, worker.stats) for worker in workers])).decode()
    assert 'rootgraft_workers{state="draining"} 1.0' in text
    assert 'rootgraft_workers{state="suspect"} 1.0' in text
    assert 'rootgraft_workers{state="ready"} 0.0' in text
    assert 'rootgraft_worker_preemptions_total{worker="a"} 3.0' in text
    assert 'rootgraft_worker_kv_blocks_used{worker="a"} 2.0' in text
    assert 'rootgraft_worker_accepted_draft_tokens_total{worker="a"} 6.0' in text
    assert 'rootgraft_worker_draft_acceptance_rate{worker="a"} 0.75' in text
    assert 'rootgraft_worker_draft_acceptance_rate{worker="b"} 0.0' in text  # no drafts at all
    assert 'rootgraft_worker_serves{model="odd\\"name",worker="b"} 1.0' in text
    assert "worker=" not in metrics.render(WorkerCollector([])).decode()

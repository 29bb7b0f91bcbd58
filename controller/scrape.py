"""The workers' own counts as Prometheus metrics, fetched at the moment of the scrape."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from controller.protocol import WorkerStats
from controller.worker_client import WorkerClient, WorkerConnectionError
from controller.workers import Worker, WorkerTable

STATS_TIMEOUT_S = 0.5

_GAUGES = (
    ("num_running", "rootgraft_worker_requests_running", "Requests in the worker's batch."),
    ("num_waiting", "rootgraft_worker_requests_waiting", "Requests in the worker's queue."),
    ("kv_blocks_used", "rootgraft_worker_kv_blocks_used", "KV blocks held by requests."),
    ("kv_blocks_total", "rootgraft_worker_kv_blocks", "KV blocks of the worker."),
    ("kv_host_blocks_used", "rootgraft_worker_kv_host_blocks_used", "Host KV blocks held by swapped requests."),
    ("kv_host_blocks_total", "rootgraft_worker_kv_host_blocks", "Host KV blocks of the worker."),
    ("max_loras", "rootgraft_worker_lora_places", "Variants that can be active at once."),
    ("num_active_loras", "rootgraft_worker_lora_places_used", "Those places that are in use, by combinations too."),
    ("num_lora_combinations", "rootgraft_worker_lora_combinations", "Combinations of variants that are known."),
    ("lora_combination_bytes", "rootgraft_worker_lora_combination_bytes", "Memory of those combinations."),
    ("draft_acceptance_rate", "rootgraft_worker_draft_acceptance_rate", "Share of draft tokens that were right."),
)
_COUNTERS = (
    ("prompt_tokens_total", "rootgraft_worker_prompt_tokens", "Prompt tokens of the worker's requests."),
    ("generation_tokens_total", "rootgraft_worker_generation_tokens", "Tokens that the worker sampled."),
    ("draft_tokens_total", "rootgraft_worker_draft_tokens", "Tokens guessed and computed on trial."),
    (
        "accepted_draft_tokens_total",
        "rootgraft_worker_accepted_draft_tokens",
        "Those of them that were right.",
    ),
    ("prefix_queried_tokens_total", "rootgraft_worker_prefix_queried_tokens", "Tokens looked up in the prefix cache."),
    ("prefix_hit_tokens_total", "rootgraft_worker_prefix_hit_tokens", "Tokens found in the prefix cache."),
    ("preemptions_total", "rootgraft_worker_preemptions", "Requests that lost their KV blocks for a while."),
    (
        "preemptions_by_swap_total",
        "rootgraft_worker_preemptions_by_swap",
        "Those that were swapped to the host.",
    ),
    ("swapped_out_blocks_total", "rootgraft_worker_swapped_out_blocks", "KV blocks copied to the host."),
    ("swapped_in_blocks_total", "rootgraft_worker_swapped_in_blocks", "KV blocks copied back from the host."),
    ("finished_total", "rootgraft_worker_requests_finished", "Requests that the worker finished."),
    ("cancelled_total", "rootgraft_worker_requests_cancelled", "Requests that were cancelled on the worker."),
    ("failed_total", "rootgraft_worker_requests_failed", "Requests that failed on the worker."),
)


async def fetch_stats(workers: WorkerTable, client: WorkerClient) -> list[tuple[Worker, WorkerStats]]:
    """The stats of every worker, asked at once; the last heartbeat's of one that does not answer in time."""

    async def fetch(worker: Worker) -> tuple[Worker, WorkerStats]:
        try:
            return worker, await client.stats(worker, timeout_s=STATS_TIMEOUT_S)
        except WorkerConnectionError:
            return worker, worker.stats

    return await asyncio.gather(*(fetch(worker) for worker in workers))


class WorkerCollector(Collector):
    """The metrics of the workers in `stats`; a worker that left is no longer among them."""

    def __init__(self, stats: Sequence[tuple[Worker, WorkerStats]]) -> None:
        self._stats = stats

    def collect(self) -> Iterable[Metric]:
        states = Counter(worker.state for worker, _ in self._stats)
        num_workers = GaugeMetricFamily("rootgraft_workers", "Registered workers by state.", labels=("state",))
        for state in ("ready", "draining", "suspect"):
            num_workers.add_metric((state,), states[state])
        yield num_workers
        serves = GaugeMetricFamily(
            "rootgraft_worker_serves", "1 for each model that a worker serves.", labels=("worker", "model")
        )
        in_flight = GaugeMetricFamily(
            "rootgraft_worker_requests_in_flight", "Requests that this controller has open there.", labels=("worker",)
        )
        for worker, _ in self._stats:
            in_flight.add_metric((worker.worker_id,), worker.num_in_flight)
            for model in worker.models:
                serves.add_metric((worker.worker_id, model.name), 1)
        yield serves
        yield in_flight
        yield from self._engine_metrics()

    def _engine_metrics(self) -> Iterator[Metric]:
        for field, name, text in _GAUGES:
            gauge = GaugeMetricFamily(name, text, labels=("worker",))
            for worker, stats in self._stats:
                gauge.add_metric((worker.worker_id,), getattr(stats, field))
            yield gauge
        for field, name, text in _COUNTERS:
            counter = CounterMetricFamily(name, text, labels=("worker",))
            for worker, stats in self._stats:
                counter.add_metric((worker.worker_id,), getattr(stats, field))
            yield counter

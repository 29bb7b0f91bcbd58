"""What the workers last said of their variants, as Prometheus metrics.

There may be thousands of variants. Those of one worker are counted by state; series of their own have at most
MAX_VARIANTS_PER_WORKER of them, the ones with the most requests.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import get_args

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from controller.protocol import VariantState, VariantStatus
from controller.workers import Worker

MAX_VARIANTS_PER_WORKER = 100

_GAUGES = (
    ("num_running", "rootgraft_variant_requests_running", "Requests for the variant in the worker's batch."),
    ("num_waiting", "rootgraft_variant_requests_waiting", "Requests for the variant in the worker's queue."),
    ("pinned", "rootgraft_variant_pinned", "1 where the variant is pinned."),
)
_COUNTERS = (
    ("loads_total", "rootgraft_variant_loads", "Times that the variant was read from disk."),
    ("load_s_total", "rootgraft_variant_load_seconds", "Seconds that reading it took."),
    ("activations_total", "rootgraft_variant_activations", "Times that it was made ready to be used."),
    ("evictions_total", "rootgraft_variant_evictions", "Times that its memory was taken for others."),
    ("hits_total", "rootgraft_variant_hits", "Requests that found it ready."),
    ("requests_total", "rootgraft_variant_requests", "Requests for it on this worker."),
    ("generation_tokens_total", "rootgraft_variant_generation_tokens", "Tokens that the worker sampled with it."),
)
_LABELS = ("worker", "variant")


class VariantCollector(Collector):
    """The metrics of the variants of `workers`.

    Args:
        wall_clock: Unix time, seconds.
    """

    def __init__(self, workers: Sequence[Worker], *, wall_clock: Callable[[], float]) -> None:
        self._workers = workers
        self._wall_clock = wall_clock

    def collect(self) -> Iterable[Metric]:
        by_state = GaugeMetricFamily(
            "rootgraft_worker_variants", "The worker's variants by state.", labels=("worker", "state")
        )
        for worker in self._workers:
            states = Counter(status.state for status in worker.variants.values())
            for state in get_args(VariantState):
                by_state.add_metric((worker.worker_id, state), states[state])
        yield by_state
        listed = [(worker.worker_id, status) for worker in self._workers for status in _most_used(worker)]
        yield from _of_variants(listed)
        if any(worker.stats.max_loras or worker.variants for worker in self._workers):
            yield self._lora_requests_info()

    def _lora_requests_info(self) -> Metric:
        """All workers as the one model server that a gateway in front of the controller sees; its value is the time.

        One sample, for gateways take the newest of several. They send a server requests for adapters that run there,
        and others as long as

            |running| + |waiting| < max_lora                        so here   max_lora = |running| + Σ free places

        (sum over workers): that is a worker's own limit where there is one, the sum of the limits where no adapter runs
        twice, and |running| where all places are in use. The running adapters are all that are ready, as the protocol
        has it. (vLLM lists those with a request in the batch only, so that gateways know of none at low load.) The
        waiting ones are those with requests that run nowhere yet.

        Source: gateway-api-inference-extension, proposal 003, model server protocol.
        """
        statuses = [status for worker in self._workers for status in worker.variants.values()]
        running = {status.name for status in statuses if status.state == "active"}
        waiting = {status.name for status in statuses if status.num_waiting > 0} - running
        num_free = sum(max(0, worker.stats.max_loras - _num_places_used(worker)) for worker in self._workers)
        labels = {
            "max_lora": str(len(running) + num_free),
            "running_lora_adapters": ",".join(sorted(running)),
            "waiting_lora_adapters": ",".join(sorted(waiting)),
        }
        info = GaugeMetricFamily(
            "vllm:lora_requests_info", "LoRA adapters that are ready, and those that wait.", labels=tuple(labels)
        )
        info.add_metric(tuple(labels.values()), self._wall_clock())
        return info


def _of_variants(listed: Sequence[tuple[str, VariantStatus]]) -> Iterator[Metric]:
    memory = GaugeMetricFamily(
        "rootgraft_variant_bytes", "Memory of the variant in a tier; none, no sample.", labels=(*_LABELS, "tier")
    )
    for worker_id, status in listed:
        for tier, num_bytes in (("host", status.host_bytes), ("active", status.active_bytes)):
            if num_bytes:
                memory.add_metric((worker_id, status.name, tier), num_bytes)
    yield memory
    for field, name, text in _GAUGES:
        gauge = GaugeMetricFamily(name, text, labels=_LABELS)
        for worker_id, status in listed:
            gauge.add_metric((worker_id, status.name), getattr(status, field))
        yield gauge
    for field, name, text in _COUNTERS:
        counter = CounterMetricFamily(name, text, labels=_LABELS)
        for worker_id, status in listed:
            counter.add_metric((worker_id, status.name), getattr(status, field))
        yield counter


def _most_used(worker: Worker) -> list[VariantStatus]:
    ordered = sorted(worker.variants.values(), key=lambda status: (-status.requests_total, status.name))
    return ordered[:MAX_VARIANTS_PER_WORKER]


def _num_places_used(worker: Worker) -> int:
    """Statuses and statistics of one heartbeat need not be of the same moment; the larger count is the safe one."""
    return max(worker.stats.num_active_loras, sum(status.state == "active" for status in worker.variants.values()))

from __future__ import annotations

import pytest

from controller.metrics import MAX_MODEL_LABELS, OTHER_MODELS, Metrics
from controller.protocol import VariantStatus, WorkerStats
from controller.scrape_variants import MAX_VARIANTS_PER_WORKER, VariantCollector
from controller.workers import Worker
from tests.controller.conftest import StartController
from tests.fakes.fake_variants import FakeVariants, digest
from tests.fakes.fake_worker import FakeWorker


def worker(worker_id: str, *variants: VariantStatus, max_loras: int = 8, num_active_loras: int = 0) -> Worker:
    stats = WorkerStats(max_loras=max_loras, num_active_loras=num_active_loras)
    added = Worker(worker_id, f"http://{worker_id}", (), stats, 0.0)
    added.variants = {status.name: status for status in variants}
    return added


def variant(name: str, **values: object) -> VariantStatus:
    return VariantStatus.model_validate({"name": name, "parent": "m", "path": name, "state": "active", **values})


def text_of(*workers: Worker) -> str:
    return Metrics().render(VariantCollector(workers, wall_clock=lambda: 1234.5)).decode()


def test_each_variant_on_each_worker() -> None:
    sql = variant(
        "sql", host_bytes=10, active_bytes=20, pinned=True, loads_total=2, load_s_total=0.5, activations_total=3,
        evictions_total=1, hits_total=4, requests_total=5, generation_tokens_total=60, num_running=1, num_waiting=2,
    )  # fmt: skip
    text = text_of(worker("a", sql), worker("b", variant("sql", state="on_disk", loads_total=1)))
    labels = 'variant="sql",worker="a"'
    assert f'rootgraft_variant_bytes{{tier="host",{labels}}} 10.0' in text
    assert f'rootgraft_variant_bytes{{tier="active",{labels}}} 20.0' in text
    for name, value in (
        ("requests_running", 1), ("requests_waiting", 2), ("pinned", 1), ("loads_total", 2),
        ("load_seconds_total", 0.5), ("activations_total", 3), ("evictions_total", 1), ("hits_total", 4),
        ("requests_total", 5), ("generation_tokens_total", 60),
    ):  # fmt: skip
        assert f"rootgraft_variant_{name}{{{labels}}} {float(value)}" in text
    assert 'rootgraft_worker_variants{state="active",worker="a"} 1.0' in text
    assert 'rootgraft_worker_variants{state="on_disk",worker="b"} 1.0' in text
    assert 'rootgraft_worker_variants{state="active",worker="b"} 0.0' in text
    assert 'rootgraft_variant_loads_total{variant="sql",worker="b"} 1.0' in text
    assert 'tier="active",variant="sql",worker="b"' not in text


def test_what_gateways_read() -> None:
    text = text_of(
        worker("a", variant("sql"), variant("chat", state="in_host_memory", num_waiting=1)),
        worker("b", variant("sql", num_waiting=2), variant("abc"), max_loras=4),
    )
    labels = 'max_lora="11",running_lora_adapters="abc,sql",waiting_lora_adapters="chat"'  # 2 and 7 + 2 free places
    assert f"vllm:lora_requests_info{{{labels}}} 1234.5" in text
    assert text.count("vllm:lora_requests_info{") == 1
    assert "lora_requests_info" not in text_of(worker("base", max_loras=0))


@pytest.mark.parametrize(
    ("workers", "max_lora"),
    [
        ([worker("a", variant("sql"), max_loras=4)], 4),  # its own
        ([worker("a", variant("sql"), max_loras=4), worker("b", variant("chat"), max_loras=2)], 6),  # no replicas
        ([worker("a", variant("sql"), max_loras=1), worker("b", variant("sql"), max_loras=1)], 1),  # full
        ([worker("a", variant("sql"), max_loras=4, num_active_loras=3)], 2),  # two places for combinations
    ],
)
def test_gateways_see_whether_there_is_a_place_for_another_adapter(workers: list[Worker], max_lora: int) -> None:
    assert f'max_lora="{max_lora}",' in text_of(*workers)


def test_the_number_of_series_is_bounded() -> None:
    many = [variant(f"v{i}", requests_total=i) for i in range(MAX_VARIANTS_PER_WORKER + 10)]
    text = text_of(worker("a", *many))
    assert text.count("rootgraft_variant_hits_total{") == MAX_VARIANTS_PER_WORKER
    assert 'variant="v9"' not in text
    assert f'rootgraft_worker_variants{{state="active",worker="a"}} {float(len(many))}' in text


def test_models_beyond_the_bound_count_together() -> None:
    metrics = Metrics()
    for number in range(MAX_MODEL_LABELS + 5):
        with metrics.start_request("/r") as observer:
            observer.set_model(f"m{number}")
    text = metrics.render().decode()
    assert f'rootgraft_requests_total{{model="{OTHER_MODELS}",route="/r",status="200"}} 5.0' in text
    assert text.count("rootgraft_requests_total{") == MAX_MODEL_LABELS + 1


async def test_the_metrics_page_shows_variants_and_requests_for_them(start_controller: StartController) -> None:
    controller = await start_controller(heartbeat_interval_s=60.0)
    async with FakeWorker("w1", variants=FakeVariants(files={"sql": digest("sql")})) as worker:
        worker.variants.from_command_line("sql", "sql")
        await worker.register(controller.url)
        assert (await controller.post("/v1/completions", json={"model": "sql", "prompt": "x"})).status == 200
        text = await (await controller.get("/metrics")).text()
    assert 'rootgraft_worker_variants{state="active",worker="w1"} 1.0' in text
    assert 'rootgraft_completion_tokens_total{model="sql"} 2.0' in text
    assert 'rootgraft_request_seconds_count{model="sql",route="/v1/completions"} 1.0' in text
    assert 'running_lora_adapters="sql"' in text

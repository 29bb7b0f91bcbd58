from __future__ import annotations

from itertools import count

import pytest
from hypothesis import given, strategies as st

from controller.protocol import (
    PROTOCOL_VERSION,
    RegisterRequest,
    ServedModel,
    VariantReport,
    VariantStatus,
    WorkerStats,
)
from controller.workers import SETTLE_S, WorkerTable
from registry.errors import InvalidRequestError


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def request(
    worker_id: str = "w1",
    port: int = 1,
    *,
    model: str = "m",
    stats: WorkerStats | None = None,
    version: int = PROTOCOL_VERSION,
    digest: str | None = None,
) -> RegisterRequest:
    return RegisterRequest(
        protocol_version=version,
        worker_id=worker_id,
        url=f"http://127.0.0.1:{port}",
        models=[ServedModel(name=model, family="llama", max_model_len=64, chat=True, dtype="fp32", digest=digest)],
        stats=stats or WorkerStats(),
        variants=report(),
    )


_numbers = count(1)


def report(*variants: VariantStatus) -> VariantReport:
    """A complete one, newer than those before it."""
    return VariantReport(number=next(_numbers), variants=list(variants))


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def table(clock: Clock) -> WorkerTable:
    return WorkerTable(clock=clock, expiry_s=3.0)


def test_another_protocol_version_is_refused(table: WorkerTable) -> None:
    with pytest.raises(InvalidRequestError, match="version"):
        table.register(request(version=PROTOCOL_VERSION + 1))
    assert len(table) == 0


@pytest.mark.parametrize(("worker_id", "port"), [("w1", 2), ("w2", 1)])
def test_same_id_or_same_url_replaces(table: WorkerTable, worker_id: str, port: int) -> None:
    first, _ = table.register(request("w1", 1))
    second, replaced = table.register(request(worker_id, port))
    assert replaced == [first]
    assert list(table) == [second]


def test_other_weights_under_a_live_name_are_refused_and_the_same_weights_are_a_replica(table: WorkerTable) -> None:
    table.register(request("w1", 1, digest="sha256:a"))
    with pytest.raises(InvalidRequestError, match="other weights"):
        table.register(request("w2", 2, digest="sha256:b"))
    assert len(table) == 1
    table.register(request("w2", 2, digest="sha256:a"))
    table.register(request("w3", 3, model="other", digest="sha256:b"))
    assert len(table) == 3


def test_a_worker_started_again_at_its_address_may_bring_other_weights(table: WorkerTable) -> None:
    table.register(request("w1", 1, digest="sha256:a"))
    table.register(request("w2", 1, digest="sha256:b"))
    assert [worker.worker_id for worker in table] == ["w2"]


def test_two_workers_stay_two(table: WorkerTable) -> None:
    table.register(request("w1", 1))
    _, replaced = table.register(request("w2", 2))
    assert replaced == []
    assert [worker.worker_id for worker in table.serving("m")] == ["w1", "w2"]
    assert table.serving("other") == []


def test_expiry_counts_from_the_last_heartbeat(table: WorkerTable, clock: Clock) -> None:
    worker, _ = table.register(request())
    clock.now += 3.0
    assert table.expire() == []
    assert table.heartbeat("w1", WorkerStats(num_running=2), report())
    clock.now += 3.5
    assert table.serving("m") == list(table) == []  # not routed to, even before anybody calls expire
    assert table.models() == {}
    assert table.expire() == [worker]
    assert table.expire() == []
    assert not table.heartbeat("w1", WorkerStats(), report())


def test_nobody_expires_once_heartbeats_cannot_arrive(table: WorkerTable, clock: Clock) -> None:
    worker, _ = table.register(request())
    table.stop_expiry()
    clock.now += 1e6
    assert table.expire() == []
    assert table.serving("m") == [worker]


def test_leave(table: WorkerTable) -> None:
    worker, _ = table.register(request())
    assert table.leave("w1") is worker
    assert table.leave("w1") is None


def test_draining_workers_are_not_routed_to(table: WorkerTable) -> None:
    worker, _ = table.register(request())
    table.heartbeat("w1", WorkerStats(draining=True), report())
    assert worker.state == "draining"
    assert table.serving("m") == []
    table.heartbeat("w1", WorkerStats(), report())
    assert table.serving("m") == [worker]


def test_a_failed_worker_is_suspect_until_its_next_heartbeat(table: WorkerTable) -> None:
    worker, _ = table.register(request())
    table.mark_failed(worker)
    assert worker.state == "suspect"
    assert table.serving("m") == []
    table.heartbeat("w1", WorkerStats(), report())
    assert table.serving("m") == [worker]


def test_a_failure_of_the_worker_before_it_does_not_touch_the_one_registered_now(table: WorkerTable) -> None:
    old, _ = table.register(request())
    new, _ = table.register(request())
    table.mark_failed(old)
    assert table.serving("m") == [new]


def sql(**values: object) -> VariantStatus:
    return VariantStatus.model_validate(
        {"name": "sql", "parent": "m", "path": "p", "digest": "A", "state": "on_disk", **values}
    )


def test_an_answer_outweighs_heartbeats_that_may_be_older(table: WorkerTable, clock: Clock) -> None:
    worker, _ = table.register(request())
    table.note_variant(worker, "sql", sql(pinned=True))
    for stale in ([], [sql()], [sql(digest="older", pinned=True)]):
        table.heartbeat("w1", WorkerStats(), report(*stale))
        assert worker.variants == {"sql": sql(pinned=True)}
    table.heartbeat("w1", WorkerStats(), report(sql(pinned=True, state="active")))
    assert worker.variants["sql"].state == "active"  # what else has changed is news
    table.note_variant(worker, "sql", None)
    table.heartbeat("w1", WorkerStats(), report(sql()))
    assert worker.variants == {}
    clock.now += SETTLE_S + 0.1
    table.heartbeat("w1", WorkerStats(), report(sql()))
    assert worker.variants == {"sql": sql()}
    assert worker.answers == {}


def test_names_of_models_and_variants_are_apart(table: WorkerTable) -> None:
    variant = sql(name="m", parent="other", from_command_line=True)
    with pytest.raises(InvalidRequestError, match="m would be the name of a model and of a variant"):
        table.register(request("w1", 1).model_copy(update={"variants": report(variant)}))
    table.register(request("w1", 1, model="other").model_copy(update={"variants": report(variant)}))
    with pytest.raises(InvalidRequestError, match="give one of them another name"):
        table.register(request("w2", 2))
    table.register(request("w1", 1))  # the first one started again, without the variant
    assert len(table) == 1


def test_requests_since_the_heartbeat_add_to_the_reported_ones(table: WorkerTable) -> None:
    worker, _ = table.register(request(stats=WorkerStats(num_running=3, num_waiting=2)))
    assert worker.num_requests == 5
    with table.acquire(worker):
        assert worker.num_requests == 6
        table.heartbeat("w1", WorkerStats(num_running=4, num_waiting=2), report())  # has seen ours
        assert worker.num_requests == 6
        with table.acquire(worker):
            assert worker.num_requests == 7
    assert worker.num_requests == 5


def test_in_flight_is_released_when_the_request_fails(table: WorkerTable) -> None:
    worker, _ = table.register(request())
    with pytest.raises(RuntimeError), table.acquire(worker):
        raise RuntimeError
    assert worker.num_in_flight == 0


@given(st.lists(st.sampled_from(["start", "end", "heartbeat"]), max_size=60))
def test_load_is_exact_when_the_reports_are(steps: list[str]) -> None:
    """With one controller and prompt reports the estimate equals the truth at any time."""
    table = WorkerTable(clock=lambda: 0.0, expiry_s=1.0)
    worker, _ = table.register(request())
    held = []
    for step in steps:
        if step == "start":
            context = table.acquire(worker)
            context.__enter__()
            held.append(context)
        elif step == "end" and held:
            held.pop(0).__exit__(None, None, None)
        elif step == "heartbeat":
            table.heartbeat("w1", WorkerStats(num_running=len(held)), report())
        assert worker.num_requests == worker.num_in_flight == len(held)


def test_a_controller_that_stood_still_blames_no_worker(table: WorkerTable, clock: Clock) -> None:
    worker, _ = table.register(request())
    clock.now += 60.0
    table.excuse(60.0)
    assert table.expire() == []
    clock.now += 60.0
    assert table.expire() == [worker]

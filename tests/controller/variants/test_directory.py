from __future__ import annotations

from dataclasses import replace

import pytest

from controller.protocol import (
    PROTOCOL_VERSION,
    RegisterRequest,
    ServedModel,
    VariantReport,
    VariantStatus,
    WorkerStats,
)
from controller.variants.directory import VariantDirectory
from controller.variants.failures import Failures
from controller.workers import Worker, WorkerTable
from registry.errors import UpstreamError
from tests.controller.variants.test_mending import has, wants


def table() -> WorkerTable:
    return WorkerTable(clock=lambda: 0.0, expiry_s=1.0)


def register(workers: WorkerTable, *variants: VariantStatus, model: str = "m") -> Worker:
    number = len(workers) + 1
    request = RegisterRequest(
        protocol_version=PROTOCOL_VERSION,
        worker_id=f"w{number}",
        url=f"http://127.0.0.1:{number}",
        models=[ServedModel(name=model, family="llama", max_model_len=64, chat=True, dtype="fp32")],
        stats=WorkerStats(),
        variants=VariantReport(number=1, variants=list(variants)),
    )
    worker, _ = workers.register(request)
    return worker


def test_what_can_be_asked_for() -> None:
    workers = table()
    directory = VariantDirectory(workers, Failures(lambda: 0.0))
    states = ("registered", "on_disk", "in_host_memory", "active", "draining", "failed")
    worker = register(workers, *(has(state, state=state) for state in states))
    able = {state for state in states if directory.can_serve(worker, [state])}
    assert able == {"on_disk", "in_host_memory", "active"}
    assert directory.can_serve(worker, ["active", "on_disk"])
    assert not directory.can_serve(worker, ["active", "none"])
    assert directory.can_serve(worker, [])
    assert directory.parent_of("active") == "m"
    assert directory.parent_of("draining") is None
    assert "draining" not in directory.names()


def test_a_worker_that_gets_no_requests_gets_none_for_its_variants() -> None:
    workers = table()
    directory = VariantDirectory(workers, Failures(lambda: 0.0))
    worker = register(workers, has())
    assert [on.usable for on in directory.on_workers("sql")] == [True]
    workers.mark_failed(worker)
    assert [on.usable for on in directory.on_workers("sql")] == [False]


def test_a_replica_with_other_files_is_not_asked() -> None:
    workers = table()
    directory = VariantDirectory(workers, Failures(lambda: 0.0))
    first, second = register(workers, has(digest="A")), register(workers, has(digest="B"))
    assert [on.usable for on in directory.on_workers("sql")] == [True, False]
    directory.put(wants(digest="B"))  # the catalog has the say
    assert [directory.can_serve(worker, ["sql"]) for worker in (first, second)] == [False, True]
    error = directory.on(first, "sql").error
    assert error is not None
    assert "A" in error.message
    assert "B" in error.message


def test_files_of_command_lines_are_decided_once_and_for_as_long_as_they_are_there(
    caplog: pytest.LogCaptureFixture,
) -> None:
    workers = table()
    directory = VariantDirectory(workers, Failures(lambda: 0.0))
    own = has(digest="A", from_command_line=True)
    first, second = register(workers, own), register(workers, has(digest="B", from_command_line=True))

    def usable() -> list[str]:
        return [worker.worker_id for worker in workers if directory.can_serve(worker, ["sql"])]

    assert usable() == [first.worker_id]
    error = directory.on(second, "sql").error
    assert error is not None
    assert "start all workers with the same files" in error.message
    third = register(workers, own)
    workers.leave(first.worker_id)  # now the second one has had the name for longest
    assert usable() == [third.worker_id]
    assert not caplog.records
    workers.leave(third.worker_id)
    assert usable() == [second.worker_id]
    assert "sql is served with other files from now on" in caplog.text


def test_what_was_read_before_a_change_does_not_undo_it() -> None:
    directory = VariantDirectory(table(), Failures(lambda: 0.0))
    version = directory.version
    directory.put(wants())
    assert not directory.refresh([], version)
    assert set(directory.wanted) == {"sql"}
    assert directory.refresh([], directory.version)
    assert not directory.wanted
    directory.put(wants())
    directory.drop("sql")
    assert not directory.wanted


def test_workers_should_have_the_variants_of_their_models() -> None:
    workers = table()
    directory = VariantDirectory(workers, Failures(lambda: 0.0))
    worker, other = register(workers), register(workers, model="other")
    directory.put(wants())
    directory.put(replace(wants("chat"), parent="other"))
    assert set(directory.wanted_of(worker)) == {"sql"}
    assert set(directory.wanted_of(other)) == {"chat"}
    assert [on.worker for on in directory.on_workers("sql")] == [worker]


def test_errors_are_shown_with_the_time_of_the_next_try() -> None:
    workers, now = table(), [0.0]
    failures = Failures(lambda: now[0])
    directory = VariantDirectory(workers, failures)
    worker = register(workers, has(state="failed", error="the file is gone"))
    directory.put(wants())
    on = directory.on(worker, "sql")
    assert (on.error.message if on.error else None, on.retry_in_s) == ("the file is gone", None)
    failures.note(worker, "sql", UpstreamError("no space"))
    on = directory.on(worker, "sql")
    assert (on.error.message if on.error else None, on.retry_in_s) == ("no space", 1.0)

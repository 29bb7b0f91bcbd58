from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given, strategies as st

from controller.protocol import VariantStatus
from controller.variants.mending import next_step, to_mend
from registry.catalog import VariantRecord

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def wants(name: str = "sql", *, path: str = "p", digest: str | None = "A", pinned: bool = False) -> VariantRecord:
    return VariantRecord(name, "m", path, digest, pinned, NOW, NOW)


def has(name: str = "sql", **values: Any) -> VariantStatus:
    return VariantStatus(**{"name": name, "parent": "m", "path": "p", "digest": "A", "state": "active", **values})


@pytest.mark.parametrize(
    ("wanted", "status", "step"),
    [
        (None, None, None),
        (wants(), None, "add"),
        (wants(), has(), None),
        (wants(), has(state="draining"), "add"),
        (wants(), has(state="failed", digest=None), "add"),
        (wants(), has(digest="B"), "add"),
        (wants(digest=None), has(), "add"),  # its answer tells which files they are
        (wants(), has(path="elsewhere"), None),  # the same files
        (wants(), has(path="elsewhere", digest=None), "add"),
        (wants(), has(digest=None, state="registered"), None),
        (wants(pinned=True), has(), "pin"),
        (wants(), has(pinned=True), "unpin"),
        (wants(pinned=True), has(pinned=True), None),
        (None, has(), "remove"),
        (None, has(state="failed"), "remove"),
        (None, has(state="draining"), None),
        (None, has(from_command_line=True), None),
        (wants(pinned=True), has(from_command_line=True, digest="B"), None),
    ],
)
def test_next_step(wanted: VariantRecord | None, status: VariantStatus | None, step: str | None) -> None:
    assert next_step(wanted, status) == step


def test_pinned_ones_come_first_and_removals_last() -> None:
    wanted = {name: wants(name, pinned=name == "c") for name in "abc"}
    assert to_mend(wanted, {"x": has("x"), "b": has("b")}) == ["c", "a", "x"]


statuses = st.builds(
    has,
    path=st.sampled_from("pq"),
    digest=st.sampled_from(["A", "B", None]),
    state=st.sampled_from(["registered", "on_disk", "in_host_memory", "active", "draining", "failed"]),
    pinned=st.booleans(),
)
records = st.builds(wants, path=st.sampled_from("pq"), digest=st.sampled_from(["A", "B", None]), pinned=st.booleans())


@given(st.none() | records, st.none() | statuses)
def test_a_worker_that_does_what_it_is_told_is_left_alone_after_two_steps(
    wanted: VariantRecord | None, status: VariantStatus | None
) -> None:
    for _ in range(2):
        match next_step(wanted, status):
            case "add":
                assert wanted is not None
                wanted = wants(path=wanted.path, digest=wanted.digest or "B", pinned=wanted.pinned)
                status = has(path=wanted.path, digest=wanted.digest, pinned=wanted.pinned)
            case "remove":
                status = None
            case "pin":
                assert status is not None
                status = status.model_copy(update={"pinned": True})
            case "unpin":
                assert status is not None
                status = status.model_copy(update={"pinned": False})
    assert next_step(wanted, status) is None

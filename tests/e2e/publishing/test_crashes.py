"""Publisher, controller and workers killed (SIGKILL) at every step, while clients ask all the time."""

from __future__ import annotations

import fcntl
import hashlib
import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from delta.artifact import TENSORS_FILE
from tests.e2e.processes import wait_until
from tests.e2e.publishing.fleet import PART_BYTES, RELEASE, VICTIM_SEQS, WAIT_S, Fleet
from tests.e2e.steady_clients import NO_CONTROLLER
from tests.fakes.ports import free_port

pytestmark = pytest.mark.e2e

NO_WORKER = "503 overloaded to be tried again"
WORKER_DIED = "stream ended: worker_failed"
STEPS = {
    "the delta made": ("HEAD /admin/blobs/", "request", 0),
    "half a file uploaded": ("PUT /admin/blobs/", "request", PART_BYTES),
    "all files uploaded": (f"POST /admin/releases/{RELEASE}/versions", "request", 0),
    "the version made": (f"POST /admin/releases/{RELEASE}/versions", "reply", 0),
    "waiting for workers": (f"GET /admin/releases/{RELEASE}/versions/", "reply", 0),
    "before the alias": (f"PUT /admin/releases/{RELEASE}/aliases/prod", "request", 0),
    "the alias moved": (f"PUT /admin/releases/{RELEASE}/aliases/prod", "reply", 0),
}


def test_a_publisher_killed_at_every_step_is_started_again(fleet: Fleet) -> None:
    codec, delta = fleet.new_delta()
    before = fleet.versions()
    old = fleet.current()
    with fleet.clients() as clients:
        for step, (pattern, side, after_bytes) in STEPS.items():
            with fleet.gate.hold(pattern, side, after_bytes) as hold:
                killed = fleet.publisher(delta)
                hold.wait_reached()
                assert killed.popen.poll() is None, killed.text()
                if step != "the alias moved":
                    assert fleet.current() == old
                    clients.wait_for(fleet.serving)
                    assert codec not in clients.outcomes(), step
                killed.kill()
        assert "0 files" in fleet.publish(delta)
        clients.wait_for(codec)
    assert fleet.current() == max(fleet.versions())
    assert len(fleet.versions()) == len(before) + 1
    fleet.check_stores()


def test_a_controller_killed_at_every_step_goes_on_where_it_was(fleet: Fleet) -> None:
    """Its publisher is the same all the time. Without a controller nobody answers; a broken answer can be told."""
    codec, delta = fleet.new_delta()
    before = fleet.versions()
    old = fleet.current()
    with fleet.clients(NO_CONTROLLER, NO_WORKER) as clients, ExitStack() as held:
        holds = {step: held.enter_context(fleet.gate.hold(*where)) for step, where in STEPS.items()}
        publishing = fleet.publisher(delta)
        for step, hold in holds.items():
            hold.wait_reached()
            fleet.kill_controller()
            hold.cut()
            clients.wait_for(NO_CONTROLLER)
            fleet.start_controller()
            if "alias" not in step:  # then the publisher goes on at once
                assert fleet.current() == old
                clients.wait_for(fleet.serving)
                assert codec not in clients.outcomes(), step
        status, text = publishing.wait()
        assert status == 0, text
        assert "is away; trying on" in text
        clients.wait_for(codec)
    assert len(fleet.versions()) == len(before) + 1
    fleet.wait_until_served(fleet.current())
    fleet.check_stores()


def test_a_worker_killed_while_it_fetches_or_reads_a_version_catches_up(fleet: Fleet) -> None:
    codec, delta = fleet.new_delta()
    tensors = f"sha256:{hashlib.sha256((delta / TENSORS_FILE).read_bytes()).hexdigest()}"
    with fleet.clients(WORKER_DIED) as clients:
        with fleet.gate.hold(f"GET /internal/blobs/{tensors}", "reply", PART_BYTES) as fetching:
            publishing = fleet.publisher(delta)
            fetching.wait_reached()
            assert fleet.serving in clients.outcomes()
            assert codec not in clients.outcomes()
            fleet.kill_worker(1)
        status, text = publishing.wait()  # the other worker has it
        assert status == 0, text
        version = fleet.current()
        clients.wait_for(codec)

        files = fleet.versions()[version]["files"]
        first, *_, last = sorted(files.values())  # in this order they are fetched
        blobs = fleet.caches[1] / "rootgraft" / "store" / "blobs" / "sha256"
        with fleet.gate.hold(f"GET /internal/blobs/{last}") as fetching:
            fleet.start_worker(1)
            fetching.wait_reached()
            with opening(blobs / first.removeprefix("sha256:")[:2] / first.removeprefix("sha256:")) as opened:
                fetching.release()
                wait_until(lambda: opened, WAIT_S, "it reads the file")
                fleet.kill_worker(1)
        clients.wait_for(codec)
        fleet.start_worker(1)
        fleet.wait_until_served(version)
    fleet.check_stores()


def test_a_worker_killed_during_the_probe_catches_up(fleet: Fleet) -> None:
    """The probe waits in its queue, behind requests that fill its batch; meanwhile the old version is served."""
    if fleet.serving == "sign":
        fleet.admin("PUT", "/aliases/prod", version=fleet.other_version())
    codec, delta = fleet.new_delta("sign")
    old = fleet.current()
    port = free_port()
    with ExitStack() as busy, fleet.clients(WORKER_DIED) as clients:
        fleet.kill_worker(1)
        fleet.start_worker(1, "--port", str(port))
        fleet.wait_until_served(old)
        for _ in range(VICTIM_SEQS):
            busy.enter_context(fleet.generate_for_long(port))
        publishing = fleet.publisher(delta)
        wait_until(lambda: _is_probed(fleet), WAIT_S, "the probe")
        version = max(fleet.versions())
        assert fleet.versions()[version]["state"] == "rolling_out"
        assert fleet.current() == old
        fleet.kill_worker(1)
        status, text = publishing.wait()
        assert status == 0, text
        clients.wait_for(codec)
        fleet.start_worker(1)
        fleet.wait_until_served(version)
    fleet.check_stores()


def _is_probed(fleet: Fleet) -> bool:
    """A worker has read the newest version, and does not serve it yet."""
    on_workers = fleet.on_workers(max(fleet.versions()))
    states = [worker["status"]["state"] for worker in on_workers if worker["status"] is not None]
    return "registered" in states and any(worker["status"]["digest"] for worker in on_workers if worker["status"])


def test_either_worker_alone_serves_what_was_published(fleet: Fleet) -> None:
    version = fleet.current()
    fleet.wait_until_served(version)
    with fleet.clients(WORKER_DIED) as clients:
        for number in range(2):
            fleet.kill_worker(number)
            clients.wait_for(fleet.serving)
            fleet.start_worker(number)
            fleet.wait_until_served(version)
            clients.wait_for(fleet.serving)


@contextmanager
def opening(path: Path) -> Iterator[list[int]]:
    """Let nobody open a file: whoever tries stands still there, and is noted in the list (a lease, see fcntl(2))."""
    tried: list[int] = []
    before = signal.signal(signal.SIGIO, lambda number, frame: tried.append(number))
    file = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        except OSError as error:
            pytest.skip(f"the file system of {path} knows no leases ({error.strerror})")
        yield tried
    finally:
        os.close(file)
        signal.signal(signal.SIGIO, before)

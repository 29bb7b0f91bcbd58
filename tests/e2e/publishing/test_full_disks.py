"""Disks that are full while a delta is published: a clear error, the old version goes on, and the next try succeeds."""

from __future__ import annotations

import pytest

from tests.e2e.processes import wait_until
from tests.e2e.publishing.fleet import PART_BYTES, WAIT_S, Fleet
from tests.e2e.small_disk import SmallDisk

pytestmark = pytest.mark.e2e

LITTLE_BYTES = 256 << 10


def test_the_controllers_store_is_full(fleet: Fleet, disks: list[SmallDisk]) -> None:
    """First before anything is sent, then in the middle of a file."""
    codec, delta = fleet.new_delta()
    disk = disks[0]
    old = fleet.current()
    with fleet.clients() as clients:
        disk.leave(LITTLE_BYTES)
        status, text = fleet.publisher(delta).wait()
        assert status == 1
        assert f"no space left on the disk of {disk.path}" in text
        assert "free some and try again" in text
        disk.grow()
        with fleet.gate.hold("PUT /admin/blobs/", "request", PART_BYTES) as hold:
            publishing = fleet.publisher(delta)
            hold.wait_reached()
            disk.leave(LITTLE_BYTES)
            hold.release()
            status, text = publishing.wait()
        assert status == 1
        assert text.count("no space left on the disk") == 2
        clients.wait_for(fleet.serving)
        assert set(clients.outcomes()) == {fleet.serving}
        assert fleet.current() == old
        disk.grow()
        fleet.publish(delta)
        clients.wait_for(codec)
    fleet.wait_until_served(fleet.current())
    fleet.check_stores()


def test_the_workers_disks_are_full(fleet: Fleet, disks: list[SmallDisk]) -> None:
    """The publisher waits, and goes on by itself when one of them has room again; the other worker follows."""
    codec, delta = fleet.new_delta()
    for number in range(2):
        fleet.wait_until_clean(number)  # what they remove later would give them room
    old = fleet.current()
    with fleet.clients() as clients:
        for disk in disks[1:]:
            disk.leave(LITTLE_BYTES)
        publishing = fleet.publisher(delta)
        wait_until(lambda: publishing.text().count("no space left on the disk") == 2, WAIT_S, "two full disks")
        assert "free some and try again" in publishing.text()
        assert publishing.popen.poll() is None
        clients.wait_for(fleet.serving)
        assert set(clients.outcomes()) == {fleet.serving}
        assert fleet.current() == old
        disks[1].grow()
        status, text = publishing.wait()
        assert status == 0, text
        clients.wait_for(codec)
        disks[2].grow()
        fleet.wait_until_served(fleet.current())
    fleet.check_stores()

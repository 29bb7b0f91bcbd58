from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tests.e2e.fine_tunes import FineTunes
from tests.e2e.processes import Cluster
from tests.e2e.publishing.fleet import Fleet
from tests.e2e.small_disk import SmallDisk


@pytest.fixture(scope="package")
def disks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[SmallDisk]]:
    """One for the controller, and one for each worker."""
    with ExitStack() as mounted:
        yield [mounted.enter_context(SmallDisk(tmp_path_factory.mktemp("disk"))) for _ in range(3)]


@pytest.fixture(scope="package")
def fleet(tmp_path_factory: pytest.TempPathFactory, fine_tunes: FineTunes, disks: list[SmallDisk]) -> Iterator[Fleet]:
    cluster = Cluster(tmp_path_factory.mktemp("fleet"), fine_tunes.base)
    store, *caches = (disk.path for disk in disks)
    try:
        yield Fleet(cluster, fine_tunes, tmp_path_factory.mktemp("deltas"), store, caches)
    finally:
        cluster.stop()

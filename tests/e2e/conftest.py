from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.processes import Cluster


@pytest.fixture
def cluster(tmp_path: Path, smollm2_dir: Path) -> Iterator[Cluster]:
    """Processes of one test; all of them are gone afterwards."""
    made = Cluster(tmp_path, smollm2_dir)
    try:
        yield made
    finally:
        made.stop()

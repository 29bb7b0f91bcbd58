from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.fine_tunes import FineTunes
from tests.e2e.processes import Cluster


@pytest.fixture(scope="session")
def fine_tunes(tmp_path_factory: pytest.TempPathFactory, smollm2_dir: Path) -> FineTunes:
    return FineTunes(smollm2_dir, tmp_path_factory.mktemp("fine-tunes"))


@pytest.fixture
def cluster(tmp_path: Path, smollm2_dir: Path) -> Iterator[Cluster]:
    """Processes of one test; all of them are gone afterwards."""
    made = Cluster(tmp_path, smollm2_dir)
    try:
        yield made
    finally:
        made.stop()

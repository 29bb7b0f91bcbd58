"""Tests on a real GPU. They are run by scripts/gpu-check; elsewhere they are skipped, with the reason."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

DIRECTORY = Path(__file__).parent


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    mine = [item for item in items if DIRECTORY in item.path.parents]
    # The other tests have Triton's kernels interpreted, which is settled when a kernel is first imported.
    own_process = config.inipath == DIRECTORY / "pytest.ini"
    reason = "no GPU" if own_process else "for scripts/gpu-check: in this process kernels may be interpreted"
    for item in mine:
        item.add_marker(pytest.mark.gpu)
        if not (own_process and torch.cuda.is_available()):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)

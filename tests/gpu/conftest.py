"""Tests on a real GPU. They are run by scripts/gpu-check; elsewhere they are skipped, with the reason."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.gpu.device import DEVICE

DIRECTORY = Path(__file__).parent


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--outcomes", type=Path, help="a line of JSON for each test is appended here when it ends")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--outcomes", default=None)
    if path is not None and not hasattr(config, "workerinput"):  # of several processes, the one that hears of all tests
        config.pluginmanager.register(_Outcomes(path))


class _Outcomes:
    """Of each test, so that what is known stays known when time is over."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":  # setting up and tearing down count where they fail
            with self._path.open("a") as file:
                file.write(json.dumps({"test": report.nodeid, "outcome": report.outcome}) + "\n")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    mine = [item for item in items if DIRECTORY in item.path.parents]
    # The other tests have Triton's kernels interpreted, which is settled when a kernel is first imported.
    own_process = config.inipath == DIRECTORY / "pytest.ini"
    reason = "no GPU" if own_process else "for scripts/gpu-check: in this process kernels may be interpreted"
    for item in mine:
        item.add_marker(pytest.mark.gpu)
        if not (own_process and (torch.cuda.is_available() or DEVICE == "cpu")):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def _rehearsal(monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE == "cpu":
        from tests.fakes.fake_accelerator import pretend_to_have_a_gpu

        pretend_to_have_a_gpu(monkeypatch)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)

"""The benchmarks as they are when they are run."""

from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

from tests.fakes.scripts import scripts_of


@pytest.fixture(scope="module")
def load_script() -> Iterator[Callable[[str], ModuleType]]:
    """Imports one of them by its name."""
    with scripts_of(Path(__file__).parents[2] / "benchmarks") as load:
        yield load

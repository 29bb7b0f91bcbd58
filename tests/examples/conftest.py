"""The example scripts as they are when they are run, a tiny model, and the controller of the controller's own tests."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

from tests.controller.conftest import catalog, start_controller
from tests.examples.tiny_model import tiny_model
from tests.fakes.scripts import scripts_of

__all__ = ["catalog", "start_controller"]

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def example() -> Iterator[Callable[[str], ModuleType]]:
    """Imports a script by its name."""
    with scripts_of(EXAMPLES) as load:
        yield load


@pytest.fixture
def tiny_dir(tmp_path: Path, smollm2_dir: Path) -> Path:
    """A tiny model with the small model's tokenizer."""
    directory = tmp_path / "tiny"
    tiny_model(vocab_size=49152).save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(smollm2_dir / name, directory)
    return directory

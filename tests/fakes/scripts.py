"""Scripts that are no package, as they are when they are run."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest


@contextmanager
def scripts_of(directory: Path) -> Iterator[Callable[[str], ModuleType]]:
    """Imports them by name, with their directory on the path, as Python puts it there; forgets them at the end."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(directory))
        yield importlib.import_module
    for script in directory.glob("*.py"):
        sys.modules.pop(script.stem, None)

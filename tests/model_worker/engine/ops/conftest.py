"""Kernels for GPUs, run without one."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def interpreted() -> Iterator[Callable[[str], ModuleType]]:
    """Imports the kernels for GPUs of an op by its name; Triton's interpreter runs them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")  # read where kernels are defined, and where they are called
        pytest.importorskip("triton")
        yield lambda op: importlib.import_module(f"model_worker.engine.ops.{op}.triton")

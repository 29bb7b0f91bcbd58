"""A base, a fine-tune of it, and its lossless delta."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.delta.models import base_weights, make, save, tuned_weights


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save(tmp_path / "base", base_weights(), tokenizer='{"v": 1}', generation_config="{}")


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return save(tmp_path / "target", tuned_weights(), tokenizer='{"v": 2}', generation_config="{}")


@pytest.fixture
def delta(tmp_path: Path, base: Path, target: Path) -> Path:
    make(base, target, tmp_path / "delta")
    return tmp_path / "delta"

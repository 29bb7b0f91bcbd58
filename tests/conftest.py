"""Fixtures for the small real model, which scripts/test puts into the cache before the tests run."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from tests.fakes.patient_loop import PatientLoop

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
settings.register_profile("patient", settings(), deadline=None)  # a busy machine makes no example too slow
settings.load_profile("patient")

DATA = Path(__file__).parent / "data"
SMALL_MODEL = "smollm2-135m-instruct"


def pytest_asyncio_loop_factories() -> Mapping[str, type[PatientLoop]]:
    """Tests run in event loops that do not take a busy machine for an answer that is late."""
    return {"patient": PatientLoop}


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct, from the cache (fetched first where it is not there)."""
    from registry.fetch import fetch_model
    from registry.paths import default_cache_dir

    return fetch_model(SMALL_MODEL, default_cache_dir(os.environ), report=lambda line: None)


@pytest.fixture(scope="session")
def smollm2_dir(smollm2_gguf: Path) -> Path:
    """The same model as a safetensors directory."""
    from adapters.convert import convert_checkpoint

    target = smollm2_gguf.parent / f"{SMALL_MODEL}-safetensors"
    if not target.is_dir():
        convert_checkpoint(smollm2_gguf, target, dtype=None, report=lambda line: None)
    return target


@pytest.fixture(scope="session")
def smollm2_token_vectors() -> list[tuple[str, list[int]]]:
    """Texts and their right token ids."""
    content = json.loads((DATA / "smollm2_token_vectors.json").read_text())
    return [(vector["text"], vector["ids"]) for vector in content["vectors"]]


@pytest.fixture(scope="session")
def smollm2_greedy() -> dict[str, dict[str, Any]]:
    """Questions and the greedy answers of the model in float32: prompt_len, ids, text."""
    content = json.loads((DATA / "smollm2_greedy.json").read_text())
    return {question: answers["torch.float32"] for question, answers in content.items()}

"""The GPU's decoder where there is no GPU."""

from __future__ import annotations

from typing import Any

import pytest

from adapters.load_plan import LoadPlan
from model_worker.engine import model_runner
from model_worker.engine.config import EngineConfig
from model_worker.engine.loader import GpuRoute, load_model
from model_worker.engine.model_runner import ModelRunner
from model_worker.engine.models.causal_model import CausalModel


def make_gpu_runner(plan: LoadPlan, config: EngineConfig) -> ModelRunner:
    """A runner whose model is the native decoder for GPUs, on CPU tensors."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_runner, "load_model", _load)
        return ModelRunner(plan, config)


def _load(*args: Any, **options: Any) -> CausalModel:
    return load_model(*args, **{**options, "native": GpuRoute()})

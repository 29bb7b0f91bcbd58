"""Model runners with each way of computing a model, that for GPUs too."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from adapters.load_plan import LoadPlan
from model_worker.engine import model_runner
from model_worker.engine.config import EngineConfig
from model_worker.engine.loader import load_model
from model_worker.engine.model_runner import ModelRunner
from model_worker.engine.models.causal_model import CausalModel
from model_worker.engine.models.gpu_decoder import GpuDecoder
from model_worker.engine.ops.cpu.program import KernelLibrary
from model_worker.engine.parallel.group import OneRank


def make_runner(impl: str, plan: LoadPlan, config: EngineConfig, kernels: KernelLibrary | None) -> ModelRunner:
    """A runner whose model is computed natively, by transformers, or as on GPUs ("gpu") but on CPU tensors."""
    if impl != "gpu":
        return ModelRunner(plan, replace(config, model_impl=impl), kernels=kernels)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_runner, "load_model", load_as_on_gpus)
        runner = ModelRunner(plan, config)
    assert isinstance(runner.model, GpuDecoder)
    return runner


def load_as_on_gpus(*args: Any, **options: Any) -> CausalModel:
    """`load_model` that builds the native decoder for GPUs."""
    return load_model(*args, **{**options, "group": OneRank()})

"""Loading a model on several ranks."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace

import torch

from adapters.load_plan import LoadPlan
from model_worker.engine.config import EngineConfig
from model_worker.engine.model_runner import ModelRunner
from model_worker.engine.parallel.leading_steps import LeadingSteps
from model_worker.engine.parallel.ranks import Ranks, RunningRank
from model_worker.engine.step_profiler import Profiler
from registry.errors import InvalidRequestError


def start_ranks(
    plan: LoadPlan,
    config: EngineConfig,
    *,
    device: str = "cpu",
    profiler: Profiler | None = None,
    launch: Callable[[], RunningRank] | None = None,
) -> tuple[ModelRunner, Ranks]:
    """Rank 0's runner, whose steps all ranks compute, and the other ranks; blocks until all have loaded.

    Args:
        device: "cpu", whose processors the ranks share, or "cuda": each has a GPU.
        launch: as in Ranks.

    Raises:
        RootgraftError: the checkpoint, the memory or the configuration does not allow it, or a rank has ended.
    """
    devices = _devices(device, config.tensor_parallel_size)
    if device == "cpu" and config.num_threads is None:
        config = replace(config, num_threads=max(1, (os.cpu_count() or 1) // len(devices)))
    ranks = Ranks(plan, config, devices, launch)
    try:
        runner = ModelRunner(plan, config, device=devices[0], profiler=profiler, group=ranks.group)
        ranks.wait_until_ready()
    except BaseException as error:
        with closing(ranks):
            if isinstance(error, RuntimeError):  # of a sum that another rank did not come to: it has said why
                ranks.wait_until_ready()
        raise
    runner.steps = LeadingSteps(runner.steps, ranks)
    return runner, ranks


def _devices(device: str, size: int) -> list[str]:
    if device == "cpu":
        return ["cpu"] * size
    if torch.cuda.device_count() < size:
        raise InvalidRequestError(
            f"--tensor-parallel-size {size} needs as many GPUs, and there are {torch.cuda.device_count()}.",
            param="tensor_parallel_size",
        )
    return [f"cuda:{rank}" for rank in range(size)]

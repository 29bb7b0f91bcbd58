"""Loading a model on several ranks."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace

import torch

from adapters.load_plan import LoadPlan
from model_worker.engine.config import EngineConfig
from model_worker.engine.machine import num_usable_processors
from model_worker.engine.model_runner import ModelRunner
from model_worker.engine.parallel.leading_steps import LeadingSteps
from model_worker.engine.parallel.ranks import Ranks, RunningRank
from model_worker.engine.step_profiler import Profiler
from registry.errors import InvalidRequestError
from registry.progress import Report

logger = logging.getLogger(__name__)

_CPU = torch.device("cpu")


def start_ranks(
    plan: LoadPlan,
    config: EngineConfig,
    *,
    device: torch.device = _CPU,
    profiler: Profiler | None = None,
    report: Report = logger.info,
    launch: Callable[[], RunningRank] | None = None,
) -> tuple[ModelRunner, Ranks]:
    """Rank 0's runner, whose steps all ranks compute, and the other ranks; blocks until all have loaded.

    Args:
        device: a CPU, whose processors the ranks share, or the first one's GPU: the others have those after it.
        report: called with a line for each thing that takes long.
        launch: as in Ranks.

    Raises:
        RootgraftError: the checkpoint, the memory or the configuration does not allow it, or a rank has ended.
    """
    devices = _devices(device, config.tensor_parallel_size)
    if device.type == "cpu" and config.num_threads is None:
        config = replace(config, num_threads=max(1, num_usable_processors() // len(devices)))
    ranks = Ranks(plan, config, devices, launch)
    try:
        runner = ModelRunner(plan, config, device=devices[0], profiler=profiler, group=ranks.group, report=report)
        ranks.wait_until_ready()
    except BaseException as error:
        with closing(ranks):
            if isinstance(error, RuntimeError):  # perhaps of a sum that another rank did not come to, which says why
                ranks.raise_reason()
            raise
    runner.steps = LeadingSteps(runner.steps, ranks)
    return runner, ranks


def _devices(first: torch.device, size: int) -> list[str]:
    if first.type == "cpu":
        return ["cpu"] * size
    num_gpus = torch.cuda.device_count() - (first.index or 0)
    if num_gpus < size:
        from_there = f" from {first} on" if first.index else ""
        raise InvalidRequestError(
            f"--tensor-parallel-size {size} needs as many GPUs, and{from_there} there are {num_gpus}.",
            param="tensor_parallel_size",
        )
    return [f"cuda:{(first.index or 0) + rank}" for rank in range(size)]

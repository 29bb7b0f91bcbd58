"""Ranks that start in milliseconds: forked from a process that has everything imported."""

from __future__ import annotations

import multiprocessing
import subprocess
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess

from model_worker.engine.parallel.rank_process import main
from model_worker.engine.parallel.ranks import RunningRank

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["model_worker.engine.parallel.rank_process", "model_worker.engine.models.transformers_model"]
)


class _Process:
    """A `RankProcess`."""

    def __init__(self, process: ForkServerProcess) -> None:
        self._process = process

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def wait(self, timeout: float | None = None) -> int | None:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("a rank", timeout or 0.0)
        return self._process.exitcode

    def kill(self) -> None:
        self._process.kill()


def fork_rank(target: Callable[[Connection, Connection], None] = main) -> RunningRank:
    """For `start_ranks`; `target` is what a rank's process does."""
    steps, their_steps = _CONTEXT.Pipe()
    variants, their_variants = _CONTEXT.Pipe()
    with their_steps, their_variants:
        process = _CONTEXT.Process(target=target, args=(their_steps, their_variants), daemon=True)
        process.start()
    return RunningRank(_Process(process), steps, variants)

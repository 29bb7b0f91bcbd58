"""Ranks that end: none is waited for, and the others end too."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from model_worker.engine.async_llm_engine import AsyncLLMEngine
from model_worker.engine.config import CacheConfig, EngineConfig
from model_worker.engine.executor import ExecutorLostError
from model_worker.engine.llm_engine import LLMEngine
from model_worker.engine.parallel import rank_process, ranks, start
from model_worker.engine.parallel.messages import Ready, send
from model_worker.engine.parallel.process_group import ProcessGroup, host_store, join_store
from model_worker.engine.parallel.ranks import Ranks, RunningRank
from model_worker.engine.parallel.start import start_ranks
from model_worker.engine.sampling_params import SamplingParams
from registry.errors import CheckpointError, InsufficientMemoryError, InternalError, InvalidRequestError
from tests.fakes.divided_models import engine_of
from tests.fakes.rank_launcher import fork_rank
from tests.fakes.tiny_models import build_tiny_model, make_tiny_plan

CONFIG = EngineConfig(CacheConfig(num_blocks=64), model_impl="transformers", tensor_parallel_size=2)
ENDLESS = SamplingParams(temperature=0.0, max_tokens=200)
ROOT = Path(__file__).parents[4]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _slow_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process that is ended, if it does not stop by itself, would be that of the tests; and reasons come late."""
    monkeypatch.setattr(ranks, "_LAST_S", 600.0)
    monkeypatch.setattr(ranks, "_REASON_S", 60.0)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    build_tiny_model("llama").save_pretrained(tmp_path)
    return tmp_path


class Launcher:
    """Remembers the ranks that it starts."""

    def __init__(self) -> None:
        self.ranks: list[RunningRank] = []

    def __call__(self) -> RunningRank:
        self.ranks.append(fork_rank())
        return self.ranks[-1]


def _compute_for_ever(engine: LLMEngine) -> None:
    while True:
        engine.step()


async def _consume(engine: AsyncLLMEngine, at_news: Callable[[], None]) -> None:
    async for _ in engine.generate("0", [1, 2, 3], ENDLESS):
        at_news()


def test_a_step_that_a_killed_rank_does_not_compute_fails_with_the_reason(model: Path) -> None:
    launcher = Launcher()
    with engine_of(make_tiny_plan(model), CONFIG, launch=launcher) as engine:
        engine.add_request("0", [1, 2, 3], ENDLESS)
        engine.step()
        launcher.ranks[0].process.kill()
        with pytest.raises(ExecutorLostError, match=r"Rank 1 of this model was killed by signal 9. Start the worker"):
            _compute_for_ever(engine)


def test_an_engine_dies_with_a_rank_also_when_it_is_idle(model: Path) -> None:
    launcher = Launcher()
    died = asyncio.Event()

    async def serve() -> None:
        with engine_of(make_tiny_plan(model), CONFIG, launch=launcher) as engine:
            serving = AsyncLLMEngine(engine, on_failure=died.set)
            await serving.start()
            launcher.ranks[0].process.kill()
            await asyncio.wait_for(died.wait(), 30)
            assert isinstance(serving.failed, ExecutorLostError)
            with pytest.raises(InternalError, match="has failed"):
                await _consume(serving, lambda: None)
            await serving.stop()

    asyncio.run(serve())


def test_requests_of_an_engine_whose_rank_is_killed_end(model: Path) -> None:
    launcher = Launcher()

    async def serve() -> None:
        with engine_of(make_tiny_plan(model), CONFIG, launch=launcher) as engine:
            serving = AsyncLLMEngine(engine)
            await serving.start()
            with pytest.raises(InternalError, match="has failed"):
                await _consume(serving, launcher.ranks[0].process.kill)
            await serving.stop()

    asyncio.run(serve())


def test_what_a_rank_cannot_load_is_said_and_no_rank_stays(model: Path) -> None:
    launcher = Launcher()
    plan = make_tiny_plan(model)
    (model / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes()[:2000])
    with pytest.raises(CheckpointError):
        start_ranks(plan, CONFIG, launch=launcher)
    assert launcher.ranks[0].process.wait(30) is not None


def test_what_only_one_rank_cannot_load_is_said(model: Path) -> None:
    with pytest.raises(InsufficientMemoryError, match=r"Rank 1 \(cpu\): There is no room on this rank"):
        start_ranks(make_tiny_plan(model), CONFIG, launch=partial(fork_rank, _rank_without_room))


def _rank_without_room(steps: Connection, variants: Connection) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise InsufficientMemoryError("There is no room on this rank.")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rank_process, "ModelRunner", refuse)
        rank_process.main(steps, variants)


def test_what_one_of_several_ranks_cannot_load_is_said_also_where_another_ends_first(model: Path) -> None:
    """As ranks do whose sums wait for the one that could not load."""
    targets = iter([_rank_that_ends, _rank_that_is_ready, _rank_that_refuses_later])
    running = Ranks(make_tiny_plan(model), CONFIG, ["cpu"] * 4, lambda: fork_rank(next(targets)))
    try:
        with pytest.raises(InvalidRequestError, match=r"^Rank 3 \(cpu\): Not with this one\.$") as refusal:
            running.wait_until_ready()
        assert refusal.value.param == "kv_cache"
    finally:
        running.close()


def _rank_that_ends(steps: Connection, variants: Connection) -> None:
    steps.recv()


def _rank_that_is_ready(steps: Connection, variants: Connection) -> None:
    steps.recv()
    send([steps], Ready())
    _wait_for_rank_0(steps)


def _rank_that_refuses_later(steps: Connection, variants: Connection) -> None:
    steps.recv()
    time.sleep(0.5)
    send([steps], InvalidRequestError("Not with this one.", param="kv_cache"))


def _rank_that_never_loads(steps: Connection, variants: Connection) -> None:
    steps.recv()
    _wait_for_rank_0(steps)


def _wait_for_rank_0(steps: Connection) -> None:
    with pytest.raises(EOFError):
        steps.recv()


@pytest.mark.parametrize("rank", [_rank_that_never_loads, _rank_that_is_ready])
def test_what_rank_0_cannot_load_is_said_where_the_others_still_wait_for_it(
    model: Path, monkeypatch: pytest.MonkeyPatch, rank: Callable[[Connection, Connection], None]
) -> None:
    def fail(*args: object, **options: object) -> None:
        raise RuntimeError("A kernel has failed.")

    monkeypatch.setattr(start, "ModelRunner", fail)
    monkeypatch.setattr(ranks, "_REASON_S", 0.2)
    with pytest.raises(RuntimeError, match="A kernel has failed"):
        start_ranks(make_tiny_plan(model), CONFIG, launch=partial(fork_rank, rank))


def test_ranks_end_with_the_process_of_rank_0(model: Path) -> None:
    """Also when that is killed."""
    script = f"""
import time
from pathlib import Path
import psutil
from model_worker.engine.parallel.start import start_ranks
from tests.fakes.tiny_models import make_tiny_plan
from tests.model_worker.engine.parallel.test_ranks import CONFIG
runner, ranks = start_ranks(make_tiny_plan(Path({str(model)!r})), CONFIG)
print(*[child.pid for child in psutil.Process().children()], flush=True)
time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        pids = [int(pid) for pid in process.stdout.readline().split()]
        assert len(pids) == 1
        os.kill(process.pid, signal.SIGKILL)
    deadline = time.monotonic() + 30
    while any(psutil.pid_exists(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _two_groups() -> list[ProcessGroup]:
    store, port = host_store(2)
    device = torch.device("cpu")
    finds: list[Callable[[], Any]] = [lambda: store, partial(join_store, port, 2)]
    return [ProcessGroup(find, rank=rank, size=2, device=device) for rank, find in enumerate(finds)]


def test_nobody_waits_for_ever_for_a_rank_that_is_stuck() -> None:
    groups = _two_groups()
    groups[0].wait_at_most(0.2)
    with pytest.raises(RuntimeError, match="Timed out"):
        groups[0].all_reduce(torch.ones(3))
    for group in groups:
        group.abort()


def test_nobody_waits_for_a_rank_that_never_comes() -> None:
    store, _ = host_store(2)
    group = ProcessGroup(lambda: store, rank=0, size=2, device=torch.device("cpu"))
    threading.Timer(0.1, group.abort).start()
    with pytest.raises(RuntimeError, match="aborted"):
        group.minimum(3)


def test_ranks_agree_on_the_least(model: Path) -> None:
    groups = _two_groups()
    found: list[int] = []
    other = threading.Thread(target=lambda: found.append(groups[1].minimum(5)))
    other.start()
    found.append(groups[0].minimum(7))
    other.join()
    assert found == [5, 5]
    for group in groups:
        group.abort()


def test_what_a_step_gives_that_is_not_done_in_time_is_not_used(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU a sum that a rank does not come to raises nothing."""
    launcher = Launcher()
    with engine_of(make_tiny_plan(model), CONFIG, launch=launcher) as engine:
        assert engine._ranks is not None
        monkeypatch.setattr(ranks, "STEP_TIMEOUT_S", 0.1)
        lost = threading.Event()
        engine._ranks.on_lost = lost.set
        with (
            pytest.raises(ExecutorLostError, match=r"not done after 0 s: .* stuck. Start the worker"),
            engine._ranks.waiting(),
        ):
            lost.wait(30)


def test_what_is_there_after_a_rank_is_gone_is_not_used(model: Path) -> None:
    launcher = Launcher()
    with engine_of(make_tiny_plan(model), CONFIG, launch=launcher) as engine:
        assert engine._ranks is not None
        lost = threading.Event()
        engine._ranks.on_lost = lost.set
        launcher.ranks[0].process.kill()
        with pytest.raises(ExecutorLostError, match="killed by signal 9"), engine._ranks.waiting():
            lost.wait(30)


def test_a_process_that_cannot_stop_by_itself_is_ended(model: Path) -> None:
    """Rank 0's thread waits here for a device that does not answer."""
    script = f"""
import logging, time
from pathlib import Path
from model_worker.engine.parallel import ranks
from model_worker.engine.parallel.start import start_ranks
from tests.fakes.tiny_models import make_tiny_plan
from tests.model_worker.engine.parallel.test_ranks import CONFIG, Launcher
ranks._LAST_S = 0.1
launcher = Launcher()
runner, running = start_ranks(make_tiny_plan(Path({str(model)!r})), CONFIG, launch=launcher)
launcher.ranks[0].process.kill()
time.sleep(600)
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=False)
    assert ended.returncode == 1
    assert "Rank 1 of this model was killed by signal 9. This process ends" in ended.stderr

"""The other ranks, as rank 0 sees them: processes that it starts, tells what to do, and outlives."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from queue import Empty, SimpleQueue
from typing import Literal, Protocol

import torch
from torch import Tensor

from adapters.load_plan import LoadPlan
from delta.variant_terms import VariantTerms
from model_worker.engine.config import EngineConfig
from model_worker.engine.executor import ExecutorLostError
from model_worker.engine.gpu_memory import is_out_of_memory
from model_worker.engine.gpu_sizing import settings_for_smaller_steps
from model_worker.engine.parallel.messages import Assignment, Bind, Step, Weight, send
from model_worker.engine.parallel.process_group import STEP_TIMEOUT_S, ProcessGroup, host_store
from model_worker.engine.step_batch import StepBatch
from registry.errors import RootgraftError

logger = logging.getLogger(__name__)

_REASON_S = 5.0  # that is waited for why a rank ended, once something shows that one did
_END_S = 5.0  # that a rank has for ending by itself
_LAST_S = 30.0  # that this process has for ending by itself, once the ranks are lost


class RankProcess(Protocol):
    """The process of a rank, as `subprocess.Popen` is one."""

    def wait(self, timeout: float | None = None) -> int | None:
        """Its exit status, or minus the signal that killed it.

        Raises:
            subprocess.TimeoutExpired: it has not ended.
        """
        ...

    def kill(self) -> None: ...


@dataclass(frozen=True, slots=True)
class RunningRank:
    """Another rank: its process and rank 0's ends of its connections."""

    process: RankProcess
    steps: Connection
    variants: Connection


class _Fate:
    """What became of the ranks.

    Attributes:
        over: they may end.
        lost: why no step can be computed any more, if that is so.
        known: `lost` is set.
        on_lost: see Ranks.
        deadline_s: until which what is waited for has to be there, in monotonic time; None: nobody waits.
    """

    def __init__(self, group: ProcessGroup) -> None:
        self.group = group
        self.over = threading.Event()
        self.lost: str | None = None
        self.known = threading.Event()
        self.on_lost: Callable[[], None] = _nobody_waits
        self.deadline_s: float | None = None
        self._lock = threading.Lock()

    def lose(self, why: str) -> None:
        """Say why, let nobody wait any more, and see to it that this process ends. Only the first call counts."""
        with self._lock:
            if self.over.is_set() or self.lost is not None:
                return
            self.lost = why
        self.known.set()
        self.group.abort()
        self.on_lost()
        if not self.over.wait(_LAST_S):  # a call on the device that does not come back, for instance
            logger.critical("%s This process ends, because it cannot stop by itself.", why)
            logging.shutdown()
            os._exit(1)


class Ranks:
    """All ranks but 0; they end with this object, or with its process.

    Steps are sent by one thread, variants by another.

    Args:
        plan, config: the model.
        devices: of all ranks, the first that of rank 0.
        launch: starts the process of a rank.

    Attributes:
        group: of all ranks, for rank 0.

    Raises:
        ExecutorLostError: one of them has ended already.
    """

    def __init__(
        self,
        plan: LoadPlan,
        config: EngineConfig,
        devices: Sequence[str],
        launch: Callable[[], RunningRank] | None = None,
    ) -> None:
        store, port = host_store(len(devices))
        device = torch.device(devices[0])
        self.group = ProcessGroup(lambda: store, rank=0, size=len(devices), device=device)
        self._devices = devices
        self._config = config
        self._loading = list(range(1, len(devices)))  # ranks that have not said how it ended
        self._fate = _Fate(self.group)
        self._dropped: SimpleQueue[int] = SimpleQueue()
        self._variants_lock = threading.Lock()
        self._num_variants = 0
        self._ranks: list[RunningRank] = []
        self._end = weakref.finalize(self, _end, self._ranks, self._fate)
        try:
            for rank in range(1, len(devices)):
                self._ranks.append((launch or launch_rank)())
                watched = (rank, self._ranks[-1].process, self._fate)
                threading.Thread(target=_watch, args=watched, daemon=True).start()
            plan = replace(plan, chat_template=None)  # rank 0 talks
            assignments = [
                Assignment(rank, len(devices), port, devices[rank], plan, config) for rank in range(1, len(devices))
            ]
            threading.Thread(target=_assign, args=([*self._ranks], assignments), daemon=True).start()
        except BaseException:
            self.close()
            raise

    @property
    def on_lost(self) -> Callable[[], None]:
        """Called on a thread of its own when a rank has ended that should not have."""
        return self._fate.on_lost

    @on_lost.setter
    def on_lost(self, call: Callable[[], None]) -> None:
        self._fate.on_lost = call
        if self._fate.known.is_set():
            call()

    def wait_until_ready(self) -> None:
        """Until all have loaded their share.

        Raises:
            RootgraftError: one of them could not.
        """
        try:
            while self._loading:
                for rank in self._with_news(None):
                    self._hear(rank)
        except (EOFError, OSError) as error:
            self.raise_reason()
            raise self.lost() from error
        self.group.wait_at_most(STEP_TIMEOUT_S)
        threading.Thread(target=_watch_time, args=(self._fate,), daemon=True).start()

    def raise_reason(self) -> None:
        """Call this when loading has failed here: another rank may be the cause, and has a moment for saying so.

        Raises:
            RootgraftError: it is.
        """
        has_ended = False
        deadline_s = time.monotonic() + _REASON_S
        while self._loading and (ranks := self._with_news(max(0.0, deadline_s - time.monotonic()))):
            for rank in ranks:
                try:
                    self._hear(rank)
                except (EOFError, OSError):  # perhaps because of one that says why
                    has_ended = True
        if has_ended:
            raise self.lost()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around waiting for what a rank that is stuck or gone keeps from coming without raising anything.

        Raises:
            ExecutorLostError: the ranks are lost; what was waited for is garbage.
        """
        self._fate.deadline_s = time.monotonic() + STEP_TIMEOUT_S
        try:
            yield
        finally:
            self._fate.deadline_s = None
        if self._fate.lost is not None:
            raise self.lost()

    def send_step(self, batch: StepBatch, variants: dict[int, int]) -> None:
        """Have a batch computed; `variants` are the numbers that `bind` gave, by those of the batch.

        Raises:
            ExecutorLostError: a rank has ended.
        """
        if self._fate.lost is not None:
            raise self.lost()
        step = Step(batch, variants, self._take_dropped())
        try:
            with self.waiting():  # one that is stuck reads nothing, and a step may not fit into its connection
                send([other.steps for other in self._ranks], step)
        except OSError as error:
            raise self.lost() from error

    def bind(self, terms: Sequence[VariantTerms]) -> tuple[int, list[int]]:
        """Have each rank but 0 keep its terms of a variant. Returns the variant's number and its bytes on each.

        Raises:
            RootgraftError: one of them could not, or has ended.
        """
        with self._variants_lock:
            self._num_variants += 1
            number, dropped = self._num_variants, self._take_dropped()
            try:
                answers = self._ask([Bind(number, of_rank, dropped) for of_rank in terms])
            except RootgraftError:
                self.drop(number)
                raise
        return number, [answer for answer in answers if isinstance(answer, int)]

    def drop(self, number: int) -> None:
        """Let the ranks forget a variant, by and by. Any thread may call this, at any time."""
        self._dropped.put(number)

    def weights(self, module: str, kind: Literal["weight", "bias"]) -> list[Tensor | None]:
        """Of each rank but 0, its share of a weight or bias; None: it has none.

        Raises:
            RootgraftError: one of them could not give it, or has ended.
        """
        with self._variants_lock:
            answers = self._ask([Weight(module, kind)] * len(self._ranks))
        return [answer if isinstance(answer, Tensor) else None for answer in answers]

    def lost(self, cause: Exception | None = None) -> ExecutorLostError:
        """What to say of a step that did not succeed.

        Args:
            cause: that it had on rank 0, which may be that another rank has ended.
        """
        self._fate.known.wait(_REASON_S)
        if self._fate.lost is not None:
            return ExecutorLostError(f"{self._fate.lost} Start the worker again.")
        if cause is None:
            return ExecutorLostError("A rank of this model does not answer any more. Start the worker again.")
        lines = str(cause).splitlines()
        what = f"{type(cause).__name__}: {lines[0]}" if lines else type(cause).__name__
        remedy = ""
        if isinstance(cause, RuntimeError) and is_out_of_memory(cause):
            remedy = f" with {settings_for_smaller_steps(self._config)}"
        return ExecutorLostError(
            f"A step failed on rank 0 ({what}), and the others wait for it. Start the worker again{remedy}."
        )

    def close(self) -> None:
        """End the ranks."""
        self._end()

    def _ask(self, requests: Sequence[Bind | Weight]) -> list[object]:
        try:
            for other, request in zip(self._ranks, requests, strict=True):
                send([other.variants], request)
        except OSError as error:
            raise self.lost() from error
        answers: list[object] = [self._receive(other.variants) for other in self._ranks]
        for answer in answers:
            if isinstance(answer, RootgraftError):
                raise answer
        return answers

    def _receive(self, channel: Connection) -> object:
        try:
            message: object = channel.recv()
        except (EOFError, OSError) as error:
            raise self.lost() from error
        return message

    def _with_news(self, timeout_s: float | None) -> list[int]:
        """Of the ranks that load, those that have said how it ended, or are gone; none when the time is over."""
        ready = wait([self._ranks[rank - 1].steps for rank in self._loading], timeout_s)
        return [rank for rank in self._loading if self._ranks[rank - 1].steps in ready]

    def _hear(self, rank: int) -> None:
        """Raises:
        EOFError, OSError: it is gone.
        RootgraftError: it could not load.
        """
        self._loading.remove(rank)
        reply = self._ranks[rank - 1].steps.recv()
        if isinstance(reply, RootgraftError):
            reply.message = f"Rank {rank} ({self._devices[rank]}): {reply.message}"
            reply.args = (reply.message,)
            raise reply

    def _take_dropped(self) -> tuple[int, ...]:
        numbers: list[int] = []
        try:
            while True:
                numbers.append(self._dropped.get_nowait())
        except Empty:
            return tuple(numbers)


def _assign(ranks: Sequence[RunningRank], assignments: Sequence[Assignment]) -> None:
    """Each reads its assignment when it has started, which rank 0 does not wait for."""
    for other, assignment in zip(ranks, assignments, strict=True):
        try:
            send([other.steps], assignment)
        except OSError:  # it has ended, which `_watch` says
            return


def _watch(rank: int, process: RankProcess, fate: _Fate) -> None:
    status = process.wait()
    if status is not None and status < 0:
        how = f"was killed by signal {-status}"
    else:
        how = f"ended with status {status}; its own lines in the log say why"
    fate.lose(f"Rank {rank} of this model {how}.")


def _watch_time(fate: _Fate) -> None:
    while not fate.over.wait(1.0):
        deadline_s = fate.deadline_s
        if deadline_s is not None and time.monotonic() > deadline_s:
            fate.lose(f"A step was not done after {STEP_TIMEOUT_S:.0f} s: a rank of this model, or its GPU, is stuck.")
            return


def launch_rank() -> RunningRank:
    """Start a process that waits for its assignment."""
    steps, their_steps = Pipe()
    variants, their_variants = Pipe()
    with their_steps, their_variants:
        fds = (their_steps.fileno(), their_variants.fileno())
        process = subprocess.Popen(
            [sys.executable, "-m", "model_worker.engine.parallel.rank_process", *map(str, fds)],
            pass_fds=fds,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)},
            stdin=subprocess.DEVNULL,
        )
    return RunningRank(process, steps, variants)


def _end(ranks: Sequence[RunningRank], fate: _Fate) -> None:
    fate.over.set()
    for other in ranks:
        other.steps.close()
        other.variants.close()  # with which it ends
    for other in ranks:
        try:
            other.process.wait(_END_S)
        except subprocess.TimeoutExpired:
            other.process.kill()
            other.process.wait()
    fate.group.abort()


def _nobody_waits() -> None:
    pass

"""Steps one after the other, each scheduled when the one before it is done."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Protocol

from model_worker.engine.executor import Executor, ExecutorLostError
from model_worker.engine.open_requests import OpenRequests
from model_worker.engine.outputs import RequestOutput
from model_worker.engine.scheduler import Scheduler
from model_worker.engine.step import SchedulerOutput
from model_worker.engine.step_profiler import Profiler

logger = logging.getLogger(__name__)


class StepLoop(Protocol):
    """Has steps scheduled and computed, and gives their results to the open requests.

    Attributes:
        stalled: the last call had nothing to compute: all requests, if any, wait for their variants.
    """

    @property
    def stalled(self) -> bool: ...

    def step(self) -> list[RequestOutput]:
        """Go on by a step and return what each request gained."""
        ...

    def rest(self) -> None:
        """No requests are left: let go of whatever is still held for them."""
        ...


class SynchronousSteps:
    """The loop for an executor that computes in the processor that schedules.

    Args:
        clock: seconds, monotonic.
        profiler: records where the time of the steps goes.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        executor: Executor,
        requests: OpenRequests,
        *,
        clock: Callable[[], float],
        profiler: Profiler,
    ) -> None:
        self.stalled = False
        self._scheduler = scheduler
        self._executor = executor
        self._requests = requests
        self._clock = clock
        self._profiler = profiler

    def step(self) -> list[RequestOutput]:
        with self._profiler.span("schedule"):
            output = self._scheduler.schedule()
        self.stalled = not output.scheduled
        return [] if self.stalled else self._compute(output)

    def rest(self) -> None:
        """See `StepLoop`; nothing is."""

    def _compute(self, output: SchedulerOutput) -> list[RequestOutput]:
        start_s = self._clock()
        try:
            with self._profiler.span("execute", tokens=output.num_tokens, sequences=len(output.scheduled)):
                result = self._executor.execute(output)
        except ExecutorLostError:
            raise
        except Exception as error:  # whatever a kernel or an allocator throws ends this step's requests, not the server
            logger.exception("A step of %d tokens failed.", output.num_tokens)
            return self._requests.fail_step(output, error)
        self._scheduler.observe(output, seconds=self._clock() - start_s, swap_s=result.swap_s)
        with self._profiler.span("detokenize", rows=len(result.samples)):
            self._scheduler.complete(output)
            return self._requests.take(output, result)

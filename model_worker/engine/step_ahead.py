"""Steps for a device that computes by itself: the next one is launched before the tokens of this one are known.

    engine thread   schedule, launch n + 1 | result n ... | take n | schedule, launch n + 2 | result n + 1 ... | take
    device          [ step n                          ][ step n + 1                                    ][ step n + 2

So the device never waits for scheduling, for detokenization or for whoever reads the outputs. What step n samples is
*pending* while step n + 1 is scheduled: each sequence has a place for its token already, whose id the device puts into
the batch of n + 1 by itself (`StepBatch.pending`).

    of a sequence        scheduled for n + 1      n is taken          n + 1 is launched and expected
    token_ids            [ known ....... | p ]    [ known .......... ]    [ known .......... | p' ]
    num_computed_tokens               ^                        ^                        ^

A sequence has one pending token at most, and `num_computed_tokens` counts what the last expected step computes. Steps
take effect on the device in the order of their launch. So whoever has ended at n gives back its blocks at once: n + 1
still computes a row for it, which nobody takes, but whoever gets these blocks writes to them in n + 2 or later. Full
blocks become findable by others only when their step is done.

What cannot be scheduled before the tokens are known waits for them, and the step is launched afterwards: after drafts,
or where drafts would pay, for sequences whose sampling depends on their output, and where blocks are lacking, so that
somebody has to be preempted or swapped in (`Scheduler.must_precede`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

from model_worker.engine.executor import Executor, ExecutorLostError, PendingStep
from model_worker.engine.open_requests import OpenRequests
from model_worker.engine.outputs import RequestOutput
from model_worker.engine.scheduler import Scheduler
from model_worker.engine.step import SchedulerOutput
from model_worker.engine.step_profiler import Profiler

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Launched:
    """A step that is being computed."""

    output: SchedulerOutput
    pending: PendingStep
    launched_s: float


class StepsAhead:
    """The loop for an executor that runs ahead.

    Args:
        clock: seconds, monotonic.
        profiler: records where the time of the steps goes.

    Attributes:
        stalled: see `StepLoop`.
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
        self._under_way: _Launched | None = None
        self._would_draft = False
        self._last_done_s = clock()

    def step(self) -> list[RequestOutput]:
        """Launch a step, and take the result of the one before it."""
        before, self._under_way = self._under_way, None
        outputs: list[RequestOutput] = []
        idle = before is None
        if before is not None and (self._would_draft or self._scheduler.must_precede(before.output)):
            outputs += self._take(before, None)
            before = None
        with self._profiler.span("schedule"):
            output = self._scheduler.schedule(ahead=before is not None)
        self.stalled = idle and not output.scheduled
        launched = self._launch(output) if output.scheduled else None
        if before is not None:
            outputs += self._take(before, launched if isinstance(launched, _Launched) else None)
        if isinstance(launched, Exception):
            return outputs + self._requests.fail_step(output, launched)
        if launched is not None:
            self._scheduler.expect(output)
            self._under_way = launched
        return outputs

    def rest(self) -> None:
        """See `StepLoop`. All of the step that may still be under way has ended by then."""
        last, self._under_way = self._under_way, None
        if last is not None:
            outputs = self._take(last, None)
            assert not outputs

    def _launch(self, output: SchedulerOutput) -> _Launched | Exception:
        launched_s = self._clock()
        try:
            with self._profiler.span("launch", tokens=output.num_tokens, sequences=len(output.scheduled)):
                return _Launched(output, self._executor.launch(output), launched_s)
        except ExecutorLostError:
            raise
        except Exception as error:  # it ends this step's requests, once the step before it is taken
            logger.exception("A step of %d tokens could not be launched.", output.num_tokens)
            return error

    def _take(self, done: _Launched, after: _Launched | None) -> list[RequestOutput]:
        """Wait for a step and give its result to the requests. If it failed, so has the one launched after it."""
        output = done.output
        try:
            with self._profiler.span("execute", tokens=output.num_tokens, sequences=len(output.scheduled)):
                result = done.pending.result()
        except ExecutorLostError:
            raise
        except Exception as error:  # as in SynchronousSteps
            logger.exception("A step of %d tokens failed.", output.num_tokens)
            outputs = self._requests.fail_step(output, error)
            return outputs if after is None else outputs + self._requests.fail_step(after.output, error)
        done_s = self._clock()
        begun_s = max(done.launched_s, self._last_done_s)
        self._last_done_s = done_s
        if not all(item.sequence.finished for item in output.scheduled):  # else nobody may have waited for it
            self._scheduler.observe(output, seconds=done_s - begun_s, swap_s=result.swap_s)
        with self._profiler.span("detokenize", rows=len(result.samples)):
            self._scheduler.confirm(output)
            outputs = self._requests.take(output, result)
            self._would_draft = after is not None and self._scheduler.would_draft(output)
            return outputs

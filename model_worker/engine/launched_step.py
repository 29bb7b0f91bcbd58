"""Steps that a model runner has launched: what is kept of them until their result is wanted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from model_worker.engine.accelerator import Accelerator
from model_worker.engine.executor import ExecutorLostError, PendingStep
from model_worker.engine.outputs import TokenLogprobs
from model_worker.engine.pending_samples import PendingSamples
from model_worker.engine.step import StepResult
from model_worker.engine.step_runner import BoundVariants, StepRunner


@dataclass(frozen=True, slots=True)
class LaunchedStep:
    """See `PendingStep`.

    Attributes:
        steps: computes it.
        samples: None: nothing is sampled.
        bound: variants of the step, which have to live until it is done.
        done: recorded at its end; None: `samples` come then, or it is done.
    """

    steps: StepRunner
    samples: PendingSamples | None
    prompt_logprobs: dict[int, list[TokenLogprobs]]
    swap_s: float
    bound: BoundVariants
    done: torch.cuda.Event | None = None

    def result(self) -> StepResult:
        with self.steps.waiting():
            if self.done is not None:
                self.done.synchronize()
            samples = () if self.samples is None else tuple(self.samples.finish())
        return StepResult(samples, self.prompt_logprobs, self.swap_s)


@dataclass(frozen=True, slots=True)
class WatchedStep:
    """A step on a device that may fail."""

    step: PendingStep
    accelerator: Accelerator

    def result(self) -> StepResult:
        with watched(self.accelerator):
            return self.step.result()


@contextmanager
def watched(accelerator: Accelerator) -> Iterator[None]:
    """Around what is asked of a device.

    Raises:
        ExecutorLostError: it has failed.
    """
    try:
        yield
    except RuntimeError as error:
        if not accelerator.has_failed():
            raise
        raise ExecutorLostError(
            f"The GPU has failed and computes nothing any more ({str(error).splitlines()[0]}). Start the worker again."
        ) from error


def end_of_launched(device: torch.device) -> torch.cuda.Event | None:
    """Of all that was launched on a GPU until now; None for others."""
    return torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None

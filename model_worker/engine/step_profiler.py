"""Where the time of the engine's steps goes, as a trace file that Perfetto (ui.perfetto.dev) and chrome://tracing open.

    step ─┬─ schedule                            LLMEngine
          ├─ execute ─┬─ prepare                 ModelRunner
          │           ├─ forward
          │           ├─ logits
          │           └─ sample
          └─ detokenize                          LLMEngine
    deliver                                      AsyncLLMEngine

Where steps run ahead, `launch` holds what `execute` does here, and `execute` is the time that the engine waits for the
step before (see step_ahead.py).

A trace holds the first steps that are computed after the start, at most `ProfileConfig.profile_steps` of them, and is
written in one piece: when it is full, or when the engine stops. The engine waits while it is written.

Source: the Trace Event Format, Google 2016 (events "X" complete, "C" counter, "M" metadata; times in microseconds).
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.profiler import profile, record_function

from model_worker.engine.config import ProfileConfig
from model_worker.engine.model_parts import OpKind
from model_worker.engine.trace import Traceable, TraceRow
from registry.atomic_file import write_file
from registry.errors import InvalidRequestError, RootgraftError

logger = logging.getLogger(__name__)

_NOTHING: AbstractContextManager[None] = nullcontext()


class Profiler:
    """Records nothing, at the cost of a method call; the others derive from it."""

    def step(self) -> AbstractContextManager[None]:
        """Around one step of the engine."""
        return _NOTHING

    def span(self, name: str, **counts: int) -> AbstractContextManager[None]:
        """Around one part of a step; `counts` are shown with it."""
        return _NOTHING

    def watch(self, model: Traceable) -> None:
        """This is the model whose operations may be recorded."""

    def close(self) -> None:
        """The engine has stopped: write what there is."""


def make_profiler(config: ProfileConfig, *, title: str) -> Profiler:
    """The profiler that the configuration asks for.

    Args:
        title: what the process is called in the trace.

    Raises:
        InvalidRequestError: the trace could not be written where it is asked for.
    """
    if config.profile is None:
        return Profiler()
    destination = Path(config.profile)
    if destination.is_dir() or destination.suffix != ".json":
        destination = destination / f"profile-{os.getpid()}.json"
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=destination.parent):
            pass
    except OSError as error:
        raise InvalidRequestError(
            f"--profile {config.profile}: {destination.parent} cannot be written ({error.strerror}); choose another "
            "place."
        ) from error
    if config.profile_detail == "torch":
        return TorchProfiler(destination, max_steps=config.profile_steps or 10, title=title)
    return SpanProfiler(
        destination,
        max_steps=config.profile_steps or 100,
        title=title,
        with_operations=config.profile_detail == "operations",
    )


class _RecordingProfiler(Profiler, ABC):
    """Counts steps, and writes once."""

    def __init__(self, destination: Path, *, max_steps: int, title: str) -> None:
        self.destination = destination
        self._max_steps = max_steps
        self._title = title
        self._num_steps = 0
        self._recording = False
        self._done = False

    def step(self) -> AbstractContextManager[None]:
        if self._done:
            return _NOTHING
        if not self._recording:
            self._recording = True
            self._begin()
        return self._counted_step()

    @contextmanager
    def _counted_step(self) -> Iterator[None]:
        try:
            with self.span("step", step=self._num_steps):
                yield
        finally:
            self._num_steps += 1
            if self._num_steps == self._max_steps:
                self.close()

    def close(self) -> None:
        if self._done:
            return
        self._done, recording, self._recording = True, self._recording, False
        if not recording:
            logger.warning("No step was computed, so %s was not written.", self.destination)
            return
        try:
            write_file(self.destination, self._end())
        except RootgraftError as error:  # a full disk must not end the serving
            logger.error("The profile was not written: %s", error.message)
        else:
            logger.info("The profile of %d steps is in %s", self._num_steps, self.destination)

    @abstractmethod
    def _begin(self) -> None:
        """Called before the first step, by the thread that computes."""

    @abstractmethod
    def _end(self) -> bytes:
        """The trace, as JSON; called after the last step."""


@dataclass(frozen=True, slots=True)
class Span:
    """One recorded span; times in nanoseconds of the clock."""

    name: str
    thread: int
    begin_ns: int
    end_ns: int
    counts: Mapping[str, int]


class SpanProfiler(_RecordingProfiler):
    """Records the spans themselves, at some microseconds each; and the model's operations, if asked to."""

    def __init__(
        self,
        destination: Path,
        *,
        max_steps: int,
        title: str,
        with_operations: bool,
    ) -> None:
        super().__init__(destination, max_steps=max_steps, title=title)
        self._with_operations = with_operations
        self._model: Traceable | None = None
        self._spans: list[Span] = []
        self._threads: dict[int, str] = {}

    def span(self, name: str, **counts: int) -> AbstractContextManager[None]:
        return self._span(name, counts) if self._recording else _NOTHING

    def watch(self, model: Traceable) -> None:
        if self._with_operations:
            self._model = model

    def step(self) -> AbstractContextManager[None]:
        counted = super().step()
        return self._traced(self._model, counted) if self._recording and self._model is not None else counted

    @contextmanager
    def _traced(self, model: Traceable, counted: AbstractContextManager[None]) -> Iterator[None]:
        """A step with the model's operations, but without what encloses others."""
        with counted, model.trace() as rows:
            yield
            thread = threading.get_native_id()
            self._spans += [
                Span(_name(row), thread, row.begin_ns, row.begin_ns + row.self_ns, {"bytes": row.bytes_moved})
                for row in rows
                if row.kind is not OpKind.BETWEEN
            ]

    @contextmanager
    def _span(self, name: str, counts: Mapping[str, int]) -> Iterator[None]:
        begin = time.perf_counter_ns()
        try:
            yield
        finally:
            thread = threading.get_native_id()
            self._threads.setdefault(thread, threading.current_thread().name)
            self._spans.append(Span(name, thread, begin, time.perf_counter_ns(), counts))

    def _begin(self) -> None:
        pass

    def _end(self) -> bytes:
        return json.dumps(chrome_trace(self._spans, self._threads, title=self._title)).encode()


class TorchProfiler(_RecordingProfiler):
    """torch's own profiler around the same spans: every operator, at a cost that can double a step; a few MB a step."""

    def __init__(self, destination: Path, *, max_steps: int, title: str) -> None:
        super().__init__(destination, max_steps=max_steps, title=title)
        self._profile = profile(record_shapes=True)

    def span(self, name: str, **counts: int) -> AbstractContextManager[None]:
        return record_function(name, str(counts) if counts else None) if self._recording else _NOTHING

    def _begin(self) -> None:
        self._profile.start()

    def _end(self) -> bytes:
        self._profile.stop()
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory, "trace.json")
            self._profile.export_chrome_trace(str(path))
            return path.read_bytes()


def _name(row: TraceRow) -> str:
    return row.name if row.layer is None else f"{row.layer}.{row.name}"


def chrome_trace(spans: list[Span], threads: Mapping[int, str], *, title: str) -> dict[str, Any]:
    """Spans as a Chrome trace, with a counter of tokens for those that count them.

    Args:
        threads: name of each thread.
        title: name of the process.
    """
    pid = os.getpid()
    start_ns = min((span.begin_ns for span in spans), default=0)

    def microseconds(time_ns: int) -> float:
        return (time_ns - start_ns) / 1000

    events: list[dict[str, Any]] = [{"ph": "M", "name": "process_name", "pid": pid, "args": {"name": title}}]
    events += [
        {"ph": "M", "name": "thread_name", "pid": pid, "tid": thread, "args": {"name": name}}
        for thread, name in threads.items()
    ]
    for span in sorted(spans, key=lambda span: (span.begin_ns, -span.end_ns)):
        begin, end = microseconds(span.begin_ns), microseconds(span.end_ns)
        events.append(
            {
                "ph": "X", "cat": "engine", "name": span.name, "pid": pid, "tid": span.thread,
                "ts": begin, "dur": end - begin, "args": dict(span.counts),
            }
        )  # fmt: skip
        if "tokens" in span.counts:
            for time_us, tokens in ((begin, span.counts["tokens"]), (end, 0)):
                counter = {"ph": "C", "name": "tokens", "pid": pid, "ts": time_us, "args": {"tokens": tokens}}
                events.append(counter)
    return {"traceEvents": events, "displayTimeUnit": "ms"}

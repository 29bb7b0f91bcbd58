"""Single steps of a loaded model, timed and traced."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence as SequenceOf
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Literal

import torch

from model_worker.engine.model_parts import OpKind
from model_worker.engine.model_runner import ModelRunner
from model_worker.engine.sampling_params import SamplingParams
from model_worker.engine.sequence import Sequence
from model_worker.engine.step import ScheduledSequence, SchedulerOutput
from model_worker.engine.step_profiler import Profiler
from model_worker.engine.trace import TraceRow

Phase = Literal["prefill", "decode"]

_NUM_RUNS = 5  # at most, of a timed step; the quickest counts, the others were disturbed
_NUM_COMPUTED_TOKENS = 128  # of the context of decode steps, at most; the rest are copies of their keys and values
_MAX_TIME_NS = 2_000_000_000  # after so long, no further run is begun
_PARTS = {"prepare": OpKind.PREPARE, "sample": OpKind.SAMPLE}  # spans of the model runner that are no operation's


@dataclass(frozen=True, slots=True)
class StepShape:
    """What a step computes: `num_rows` sequences that are `context` tokens long at its end.

    Prefill computes all of these tokens, decode the last of each sequence.
    """

    phase: Phase
    num_rows: int
    context: int

    @property
    def num_tokens(self) -> int:
        return self.num_rows * (self.context if self.phase == "prefill" else 1)


@dataclass(frozen=True, slots=True)
class StepTime:
    """How long a step takes, from scheduler output to sampled tokens; the quickest of several."""

    shape: StepShape
    duration_ns: int


@dataclass(frozen=True, slots=True)
class StepTrace:
    """One traced step.

    Attributes:
        shape: what was computed.
        duration_ns: the quickest such step without tracing.
        traced_ns: this step, with what tracing costs.
        rows: in the order in which the operations began.
    """

    shape: StepShape
    duration_ns: int
    traced_ns: int
    rows: tuple[TraceRow, ...]


def fits(runner: ModelRunner, shape: StepShape) -> bool:
    """Whether the KV cache holds the sequences of such a step, and the batch its tokens."""
    num_blocks = shape.num_rows * _blocks_of_one(runner, shape)
    return num_blocks <= runner.num_blocks and shape.num_tokens <= runner.max_num_batched_tokens


def time_step(runner: ModelRunner, shape: StepShape, *, num_runs: int = _NUM_RUNS) -> StepTime:
    """Compute a step several times; its sequences must fit."""
    return _time(runner, _prepare(runner, shape), shape, num_runs)


def trace_step(runner: ModelRunner, shape: StepShape, *, num_runs: int = _NUM_RUNS) -> StepTrace:
    """Compute a step several times without, then several times with tracing; the quickest of each counts."""
    output = _prepare(runner, shape)
    duration_ns = _time(runner, output, shape, num_runs).duration_ns
    traces: list[StepTrace] = []
    while len(traces) < num_runs and sum(trace.traced_ns for trace in traces) < _MAX_TIME_NS:
        with _parts_of(runner) as parts, runner.model.trace() as rows:
            begin = time.perf_counter_ns()
            runner.execute(output)
            traced_ns = time.perf_counter_ns() - begin
        ordered = sorted((*rows, *parts), key=lambda row: row.begin_ns)
        traces.append(StepTrace(shape, duration_ns, traced_ns, tuple(ordered)))
    return min(traces, key=lambda trace: trace.traced_ns)


def _time(runner: ModelRunner, output: SchedulerOutput, shape: StepShape, num_runs: int) -> StepTime:
    durations: list[int] = []
    while len(durations) < num_runs and sum(durations) < _MAX_TIME_NS:
        begin = time.perf_counter_ns()
        runner.execute(output)
        durations.append(time.perf_counter_ns() - begin)
    return StepTime(shape, min(durations))


def _blocks_of_one(runner: ModelRunner, shape: StepShape) -> int:
    """Blocks of one sequence, in all layer groups together."""
    return -(-shape.context // runner.block_size) * len(runner.groups)


def _prepare(runner: ModelRunner, shape: StepShape) -> SchedulerOutput:
    """The step, ready to be computed any number of times: its sequences have keys and values."""
    generator = torch.Generator().manual_seed(0)
    num_groups, num_blocks = len(runner.groups), _blocks_of_one(runner, shape)
    items = []
    for row in range(shape.num_rows):
        token_ids = torch.randint(runner.vocab_size, (shape.context,), generator=generator).tolist()
        sequence = Sequence(row, 0, token_ids, SamplingParams(temperature=0.0), seed=row)
        # Neighbouring blocks of one sequence lie apart, as they do in a cache that has been in use.
        blocks = range(row, shape.num_rows * num_blocks, shape.num_rows)
        sequence.block_tables = [list(blocks[group::num_groups]) for group in range(num_groups)]
        start = 0 if shape.phase == "prefill" else shape.context - 1
        items.append(ScheduledSequence(sequence, start, shape.context - start, (sequence,)))
    num_computed = min(shape.context, _NUM_COMPUTED_TOKENS, runner.max_num_batched_tokens)
    _fill_cache(runner, [item.sequence for item in items], num_computed)
    output = SchedulerOutput(tuple(items))
    runner.execute(output)
    return output


def _fill_cache(runner: ModelRunner, sequences: SequenceOf[Sequence], num_tokens: int) -> None:
    """Compute the first tokens of the first sequence, and copy their blocks to all others.

    What is there does not change the time, as long as it is like real keys and values: of memory that was never
    written, the system lends the same page many times, and arbitrary bytes hold numbers that are slow to compute with.
    """
    first = sequences[0]
    runner.execute(SchedulerOutput((ScheduledSequence(first, 0, num_tokens),)))
    num_computed = -(-num_tokens // runner.block_size)
    copies = [
        (first.block_tables[group][index % num_computed], block)
        for sequence in sequences
        for group, table in enumerate(sequence.block_tables)
        for index, block in enumerate(table)
        if sequence is not first or index >= num_computed
    ]
    runner.execute(SchedulerOutput((ScheduledSequence(first, num_tokens - 1, 1),), block_copies=tuple(copies)))


@contextmanager
def _parts_of(runner: ModelRunner) -> Iterator[list[TraceRow]]:
    """Rows for what the model runner does around the model."""
    clock = _SpanClock()
    before, runner.profiler = runner.profiler, clock
    try:
        yield clock.rows
    finally:
        runner.profiler = before


class _SpanClock(Profiler):
    """Makes rows of the spans that are no operation of the model."""

    def __init__(self) -> None:
        self.rows: list[TraceRow] = []

    def span(self, name: str, **counts: int) -> AbstractContextManager[None]:
        return self._timed(name) if name in _PARTS else super().span(name, **counts)

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        begin = time.perf_counter_ns()
        row = TraceRow(None, name, _PARTS[name], (), (), "", begin, 0)
        yield
        self.rows.append(replace(row, self_ns=time.perf_counter_ns() - begin))

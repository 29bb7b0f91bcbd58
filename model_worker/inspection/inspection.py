"""Everything that can be seen of one model, in sections that can be asked for one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import psutil
import torch

from adapters.load_plan import LoadPlan
from adapters.memory import available_memory_bytes
from adapters.quantization import WeightPrecision
from model_worker.engine.config import EngineConfig
from model_worker.engine.model_runner import ModelRunner
from model_worker.engine.ops.cpu.program import KernelLibrary
from model_worker.inspection.flowchart import Flowchart, draw_flowchart
from model_worker.inspection.footprint import Footprint, measure_footprint
from model_worker.inspection.load_summary import LoadSummary, summarize_load
from model_worker.inspection.measured_step import StepShape, StepTime, StepTrace, fits, time_step, trace_step
from registry.errors import InvalidRequestError

SECTIONS = ("footprint", "load", "trace", "flowchart")
DEFAULT_ROWS = (1, 8, 32)
DEFAULT_CONTEXTS = (128, 1024)


@dataclass(frozen=True, slots=True)
class InspectRequest:
    """What to look at.

    Attributes:
        sections: of SECTIONS.
        rows: sequences of the decode steps that are timed; the last is traced.
        contexts: tokens of each sequence, for the footprint's batches and the steps; the last is traced.
        memory_bytes: memory to plan for; None: what this machine has free.
    """

    sections: tuple[str, ...] = SECTIONS
    rows: tuple[int, ...] = DEFAULT_ROWS
    contexts: tuple[int, ...] = DEFAULT_CONTEXTS
    memory_bytes: int | None = None

    @property
    def needs_weights(self) -> bool:
        return any(section != "footprint" for section in self.sections)


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """Which model was looked at, and where.

    Attributes:
        weights: how they are kept, for people.
        dtype: of weights that are not quantized, and of the KV cache unless --kv-cache-dtype says otherwise.
        implementation: class that computes it; None: it was not loaded.
        num_threads: of tensor work.
    """

    name: str
    path: str
    family: str
    model_type: str
    format: str
    weights: str
    dtype: str
    quantization: str | None
    max_model_len: int
    implementation: str | None
    num_threads: int


@dataclass(frozen=True, slots=True)
class Traces:
    """Steps of the loaded model.

    Attributes:
        prefill, decode: traced.
        times: of decode steps without tracing, one for each number of rows and each context.
        skipped: steps that the KV cache or the batch cannot hold.
    """

    prefill: StepTrace
    decode: StepTrace
    times: tuple[StepTime, ...]
    skipped: tuple[StepShape, ...]


@dataclass(frozen=True, slots=True)
class Inspection:
    """What was found; a section that was not asked for is None."""

    model: ModelFacts
    footprint: Footprint | None = None
    load: LoadSummary | None = None
    trace: Traces | None = None
    flowcharts: tuple[Flowchart, ...] = field(default=())


def inspect_model(
    plan: LoadPlan,
    config: EngineConfig,
    request: InspectRequest,
    *,
    name: str,
    kernels: KernelLibrary | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> Inspection:
    """Look at a model; it is loaded unless the footprint is all that is asked for.

    Args:
        name: what the report calls it.
        kernels: of this CPU, for the native decoder; None: there are none.
        report: called with each line of progress.

    Raises:
        InvalidRequestError: a context that the model does not have, or no step that the KV cache can hold.
        ClientError: the model cannot be loaded.
    """
    longest = max(request.contexts)
    if longest > plan.max_model_len:
        raise InvalidRequestError(
            f"--context {longest} is more than the model's {plan.max_model_len} tokens; ask for shorter ones."
        )
    free_bytes = available_memory_bytes() if request.memory_bytes is None else request.memory_bytes
    footprint = None
    if "footprint" in request.sections:
        footprint = measure_footprint(
            plan,
            contexts=sorted({*request.contexts, plan.max_model_len}),
            block_size=config.cache.block_size,
            max_num_batched_tokens=config.scheduler.max_num_batched_tokens,
            free_bytes=free_bytes,
        )
    if not request.needs_weights:
        return Inspection(_facts(plan, name, None, config.num_threads), footprint)
    report(f"Loading {name}")
    process = psutil.Process()
    resident_bytes = process.memory_info().rss
    runner = ModelRunner(plan, config, kernels=kernels)
    resident_bytes = process.memory_info().rss - resident_bytes
    load = None
    if "load" in request.sections:
        load = summarize_load(plan, runner.load_report, resident_bytes=resident_bytes)
    traces = None
    if {"trace", "flowchart"} & set(request.sections):
        traces = _trace(runner, request, config, report)
    return Inspection(
        model=_facts(plan, name, type(runner.model).__name__, config.num_threads),
        footprint=footprint,
        load=load,
        trace=traces if "trace" in request.sections else None,
        flowcharts=(
            (draw_flowchart(traces.prefill), draw_flowchart(traces.decode))
            if traces is not None and "flowchart" in request.sections
            else ()
        ),
    )


def _trace(runner: ModelRunner, request: InspectRequest, config: EngineConfig, report: Callable[[str], None]) -> Traces:
    steps = list(_decode_steps(request.rows, request.contexts))
    max_num_seqs = config.scheduler.max_num_seqs
    decode = [step for step in steps if step.num_rows <= max_num_seqs and fits(runner, step)]
    if not decode:
        num_tokens = runner.num_blocks // len(runner.groups) * runner.block_size
        raise InvalidRequestError(
            f"The KV cache of {num_tokens} tokens and a batch of {max_num_seqs} sequences and "
            f"{runner.max_num_batched_tokens} tokens hold none of these steps; ask for fewer --rows or shorter "
            "--context, or raise --kv-cache-gib, --max-num-seqs or --max-num-batched-tokens."
        )
    # A longer prompt is computed in chunks of so many tokens.
    prefill = StepShape("prefill", 1, min(decode[-1].context, config.scheduler.max_num_batched_tokens))
    times = []
    for step in decode:
        report(f"Timing decode steps of {step.num_rows} rows with {step.context} tokens of context")
        times.append(time_step(runner, step))
    report("Tracing")
    return Traces(
        prefill=trace_step(runner, prefill),
        decode=trace_step(runner, decode[-1]),
        times=tuple(times),
        skipped=tuple(step for step in steps if step not in decode),
    )


def _decode_steps(rows: Sequence[int], contexts: Sequence[int]) -> Iterator[StepShape]:
    for context in contexts:
        for num_rows in rows:
            yield StepShape("decode", num_rows, context)


def _facts(plan: LoadPlan, name: str, implementation: str | None, num_threads: int | None) -> ModelFacts:
    compression = WeightPrecision(plan.quantization, plan.kept_types).describe(plan.checkpoint)
    return ModelFacts(
        name=name,
        path=str(plan.path),
        family=plan.family.name,
        model_type=str(plan.config["model_type"]),
        format=plan.checkpoint.format,
        weights=plan.dtype if compression == "none" else compression,
        dtype=plan.dtype,
        quantization=plan.quantization,
        max_model_len=plan.max_model_len,
        implementation=implementation,
        num_threads=num_threads or torch.get_num_threads(),
    )

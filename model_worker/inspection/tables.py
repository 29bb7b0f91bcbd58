"""The tables of an inspection, as titles, heads and rows of text; table and HTML output show the same ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from model_worker.engine.trace import TraceRow
from model_worker.inspection.footprint import Footprint
from model_worker.inspection.inspection import ModelFacts, Traces
from model_worker.inspection.load_summary import LoadSummary
from model_worker.inspection.measured_step import StepShape, StepTrace
from model_worker.inspection.op_totals import Total, overhead_share, total_of, totals_by_kind, totals_by_layer
from model_worker.inspection.quantities import format_bytes, format_count, format_list, format_ms, format_share

_MEASURES = ("ms", "share", "moved", "GB/s", "FLOPs", "GFLOP/s")


@dataclass(frozen=True, slots=True)
class Table:
    """Attributes: head: of its columns. num_text_columns: the first so many hold text, the others numbers."""

    title: str
    head: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    num_text_columns: int = 1
    notes: tuple[str, ...] = field(default=())


def model_table(model: ModelFacts) -> Table:
    rows = [
        ("path", model.path),
        ("family", f"{model.family} ({model.model_type})"),
        ("format", model.format),
        ("weights", model.weights),
        ("dtype", model.dtype),
        ("context", f"{model.max_model_len} tokens"),
        ("threads", str(model.num_threads)),
    ]
    if model.implementation is not None:
        rows.append(("implementation", model.implementation))
    return Table(model.name, ("", ""), rows, num_text_columns=2)


def footprint_tables(footprint: Footprint) -> Iterator[Table]:
    names = footprint.precisions
    rows = [
        (
            part.part.value,
            format_count(part.num_parameters),
            "-" if part.stored_bytes is None else format_bytes(part.stored_bytes),
            *(format_bytes(part.bytes_by_precision[name]) for name in names),
        )
        for part in footprint.parts
    ]
    stored = [part.stored_bytes for part in footprint.parts if part.stored_bytes is not None]
    rows.append(
        (
            "all weights",
            format_count(footprint.num_parameters),
            format_bytes(sum(stored)) if stored else "-",
            *(format_bytes(footprint.weights_bytes(name)) for name in names),
        )
    )
    step = f"activations, {footprint.activation_tokens} tokens"
    rows.append((step, "", "", *[format_bytes(footprint.activations_bytes)] * len(names)))
    notes = [f"As they would be loaded, weights take {format_bytes(footprint.planned_bytes)}."]
    if "int8" in names:
        notes.append(
            "int8 and int4: matrices in groups of 32 with 16-bit scales, embedding and head in 8; the rest in 16 bits."
        )
    if footprint.tied_head:
        notes.append("The head is the embedding's matrix, and counted there.")
    yield Table("Memory by part and precision", ("part", "parameters", "in the files", *names), rows, 1, tuple(notes))
    kv = footprint.kv_bytes_per_token
    contexts = list(dict.fromkeys(limit.context for limit in footprint.batches))
    yield Table(
        "KV cache",
        ("elements of", "one token", *(f"{context} tokens" for context in contexts)),
        [
            (name, format_bytes(size), *(format_bytes(size * context) for context in contexts))
            for name, size in kv.items()
        ],
    )
    pairs = list(dict.fromkeys((limit.weights, limit.kv) for limit in footprint.batches))
    sizes = {(limit.weights, limit.kv, limit.context): limit.num_sequences for limit in footprint.batches}
    yield Table(
        f"Sequences that fit {format_bytes(footprint.free_bytes)} beside weights and activations",
        ("weights", "KV cache", *(f"{context} tokens" for context in contexts)),
        [(*pair, *(str(sizes[*pair, context]) for context in contexts)) for pair in pairs],
        num_text_columns=2,
        notes=(
            "This is what the memory allows. A worker takes half of what is free beside the weights for its KV cache, "
            "at most 4 GiB, unless --kv-cache-gib says otherwise, and computes --max-num-seqs sequences at once.",
        ),
    )


def load_tables(load: LoadSummary) -> Iterator[Table]:
    shards = f"{len(load.files)} shards" if len(load.files) > 1 else "one file"
    phases = [
        (name, f"{seconds:.3f} s", format_share(seconds / load.total_s)) for name, seconds in load.phases_s.items()
    ]
    speed = f"{load.bytes_per_s / 1e6:.0f} MB/s"
    yield Table(
        f"Loading: {format_bytes(load.file_bytes)} in {load.total_s:.2f} s, {speed}, {shards}",
        ("phase", "time", "share"),
        phases,
        notes=(
            f"The process grew by {format_bytes(load.resident_bytes)}: weights, buffers, used KV cache.",
            "A mapped file is read from the disk while the weights are filled.",
        ),
    )
    yield Table("Files", ("file", "size"), [(file.name, format_bytes(file.num_bytes)) for file in load.files])
    yield Table(
        "Tensors",
        ("became", "tensors", "size as read"),
        [(count.outcome.value, str(count.num_tensors), format_bytes(count.num_bytes)) for count in load.outcomes],
    )
    if load.fused:
        rows = [(fused.weight, str(fused.num_weights), str(fused.num_tensors)) for fused in load.fused]
        yield Table("Fused", ("weight", "weights", "of tensors"), rows)
    if load.left_out:
        rows = [(left.tensor, left.reason, str(left.num_tensors)) for left in load.left_out]
        yield Table("In no weight of their own", ("tensor", "why", "tensors"), rows, num_text_columns=2)
    if load.ties:
        yield Table("Tied", ("weight", "is"), load.ties, num_text_columns=2)


def kinds_table(trace: StepTrace) -> Table:
    """What a step is made of, the longest first."""
    rows = [(total.kind.value, str(total.total.num_ops), *_measures(total.total)) for total in totals_by_kind(trace)]
    rows.append(("all", str(len(trace.rows)), *_measures(total_of(trace))))
    untraced, traced = format_ms(trace.duration_ns), format_ms(trace.traced_ns)
    notes = (
        f"{format_share(overhead_share(trace))} of the time is outside of matrix products and attention.",
        f"The step takes {untraced} ms, and took {traced} ms while it was traced.",
    )
    return Table(f"{describe_step(trace.shape)}: by kind of operation", ("kind", "ops", *_MEASURES), rows, notes=notes)


def layers_table(trace: StepTrace) -> Table:
    rows = [
        ("outside of layers" if total.layer is None else f"layer {total.layer}", *_measures(total.total))
        for total in totals_by_layer(trace)
    ]
    return Table(f"{describe_step(trace.shape)}: by layer", ("layer", *_MEASURES), rows)


def operations_table(trace: StepTrace) -> Table:
    """One row for each operation."""
    all_ns = total_of(trace).self_ns
    return Table(
        f"{describe_step(trace.shape)}: operations",
        ("layer", "operation", "kind", "inputs", "outputs", "dtype", "ms", "share", "moved", "weights", "FLOPs"),
        [_operation(row, all_ns) for row in trace.rows],
        num_text_columns=6,
    )


def times_table(traces: Traces) -> Table:
    rows = [
        (
            str(time.shape.num_rows),
            str(time.shape.context),
            format_ms(time.duration_ns),
            f"{time.shape.num_rows * 1e9 / time.duration_ns:.0f}",
        )
        for time in traces.times
    ]
    skipped = [f"{step.num_rows} × {step.context}" for step in traces.skipped]
    notes = (f"The KV cache or the batch does not hold {', '.join(skipped)} tokens.",) if skipped else ()
    return Table("Decode steps", ("rows", "context", "ms a step", "tokens/s"), rows, 0, notes)


def describe_step(shape: StepShape) -> str:
    """`Decode, 8 rows with 512 tokens of context`"""
    if shape.phase == "prefill":
        return f"Prefill of {shape.num_tokens} tokens"
    rows = "1 row" if shape.num_rows == 1 else f"{shape.num_rows} rows"
    return f"Decode of {rows} with {shape.context} tokens of context"


def _measures(total: Total) -> tuple[str, ...]:
    return (
        format_ms(total.self_ns),
        format_share(total.share),
        format_bytes(total.bytes_moved),
        f"{total.gb_per_s:.1f}",
        format_count(total.flops),
        f"{total.gflops:.1f}",
    )


def _operation(row: TraceRow, all_ns: int) -> tuple[str, ...]:
    return (
        "" if row.layer is None else str(row.layer),
        row.name or "residual",
        row.kind.value,
        format_list([_shape(shape) for shape in row.inputs]),
        format_list([_shape(shape) for shape in row.outputs]),
        row.dtype,
        format_ms(row.self_ns),
        format_share(row.self_ns / all_ns),
        format_bytes(row.bytes_moved),
        format_bytes(row.weight_bytes),
        format_count(row.flops),
    )


def _shape(shape: tuple[int, ...]) -> str:
    return f"[{', '.join(map(str, shape))}]"

"""An inspection as one HTML page that needs nothing else: no script, no font, no picture from anywhere."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from jinja2 import Environment, PackageLoader, StrictUndefined

from model_worker.inspection.footprint import Footprint
from model_worker.inspection.inspection import Inspection, Traces
from model_worker.inspection.load_summary import LoadSummary
from model_worker.inspection.measured_step import StepTrace
from model_worker.inspection.op_totals import LayerTotal, totals_by_kind, totals_by_layer
from model_worker.inspection.quantities import format_bytes, format_count, format_ms
from model_worker.inspection.series import NAMES, series_of_kind, series_of_part
from model_worker.inspection.svg_charts import Bar, Line, Segment, draw_bars, draw_columns, draw_lines
from model_worker.inspection.svg_flowchart import draw_flowchart_svg
from model_worker.inspection.tables import (
    Table,
    describe_step,
    footprint_tables,
    kinds_table,
    layers_table,
    load_tables,
    model_table,
    operations_table,
    times_table,
)

_LINE_COLOURS = ("attention", "mlp", "norm", "embedding", "head", "experts", "kv", "other")


@dataclass(frozen=True, slots=True)
class Plot:
    """Attributes: legend: pairs of a colour's name and what it stands for."""

    title: str
    svg: str
    legend: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class PageSection:
    """Attributes: details: tables that are folded up at first."""

    id: str
    title: str
    plots: tuple[Plot, ...] = ()
    tables: tuple[Table, ...] = ()
    details: tuple[Table, ...] = ()


def format_html(inspection: Inspection) -> str:
    environment = Environment(
        loader=PackageLoader("model_worker.inspection", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.jinja").render(
        model=inspection.model,
        facts=model_table(inspection.model),
        figures=list(_figures(inspection)),
        sections=list(_sections(inspection)),
    )


def _figures(inspection: Inspection) -> Iterator[tuple[str, str]]:
    """The numbers that most people came for, with their names."""
    model, footprint, load, trace = inspection.model, inspection.footprint, inspection.load, inspection.trace
    if footprint is not None:
        yield format_count(footprint.num_parameters), "parameters"
        yield format_bytes(footprint.planned_bytes), "weights as they would be loaded"
        kv = footprint.kv_bytes_per_token["float32" if model.dtype == "float32" else "16 bits"]
        yield format_bytes(kv), "KV cache for a token"
    if load is not None:
        yield f"{load.total_s:.2f} s", f"to load, {load.bytes_per_s / 1e6:.0f} MB/s"
    if trace is not None:
        for step in (trace.prefill, trace.decode):
            what = describe_step(step.shape)
            yield f"{format_ms(step.duration_ns)} ms", what[0].lower() + what[1:]


def _sections(inspection: Inspection) -> Iterator[PageSection]:
    if inspection.footprint is not None:
        yield _footprint(inspection.footprint)
    if inspection.load is not None:
        yield _load(inspection.load)
    if inspection.trace is not None:
        yield _trace(inspection.trace)
    if inspection.flowcharts:
        plots = tuple(
            Plot(f"{chart.phase.capitalize()}, T = {chart.num_tokens} tokens", draw_flowchart_svg(chart))
            for chart in inspection.flowcharts
        )
        yield PageSection("flowchart", "Execution flowchart", plots)


def _footprint(footprint: Footprint) -> PageSection:
    bars = [
        Bar(name, (*_parts(footprint, name), Segment("activations", "activations", footprint.activations_bytes)))
        for name in footprint.precisions
    ]
    legend = tuple((segment.series, segment.name) for segment in bars[0].segments)
    plot = Plot("Weights and the activations of the largest step", draw_bars(bars, format_bytes), legend)
    return PageSection("footprint", "Memory footprint", (plot,), tuple(footprint_tables(footprint)))


def _parts(footprint: Footprint, precision: str) -> Iterator[Segment]:
    for part in footprint.parts:
        yield Segment(series_of_part(part.part), part.part.value, part.bytes_by_precision[precision])


def _load(load: LoadSummary) -> PageSection:
    phases = [Bar(name, (Segment("attention", name, seconds),)) for name, seconds in load.phases_s.items()]
    plot = Plot("Time by phase", draw_bars(phases, lambda seconds: f"{seconds:.3f} s"))
    return PageSection("load", "Weight loading", (plot,), tuple(load_tables(load)))


def _trace(traces: Traces) -> PageSection:
    plots = list(_growth(traces))
    for trace in (traces.prefill, traces.decode):
        title = describe_step(trace.shape)
        kinds = [
            Bar(total.kind.value, (Segment(series_of_kind(total.kind), total.kind.value, total.total.self_ns),))
            for total in totals_by_kind(trace)
        ]
        plots.append(Plot(f"{title}: time by kind of operation", draw_bars(kinds, lambda ns: f"{format_ms(ns)} ms")))
        layers = _columns(trace)
        svg = draw_columns(layers, format_ms_axis, x_title="layer", y_title="ms")
        plots.append(Plot(f"{title}: time by layer", svg, _legend(layers)))
    tables, details = [times_table(traces)], []
    for trace in (traces.prefill, traces.decode):
        tables.append(kinds_table(trace))
        details += [layers_table(trace), operations_table(trace)]
    return PageSection("trace", "Forward-pass trace", tuple(plots), tuple(tables), tuple(details))


def _growth(traces: Traces) -> Iterator[Plot]:
    """How the time of a decode step grows, where more than one size was measured."""
    times = [(time.shape.num_rows, time.shape.context, time.duration_ns) for time in traces.times]
    by_rows = {f"{context} tokens": [(r, ns) for r, c, ns in times if c == context] for _, context, _ in times}
    by_context = {_rows(rows): [(c, ns) for r, c, ns in times if r == rows] for rows, _, _ in times}
    for title, x_title, groups in (
        ("Decode step by rows, for each length of the context", "rows", by_rows),
        ("Decode step by context, for each number of rows", "tokens of context", by_context),
    ):
        lines = [
            Line(_LINE_COLOURS[index % len(_LINE_COLOURS)], name, tuple(points))
            for index, (name, points) in enumerate(groups.items())
        ]
        if max(len(line.points) for line in lines) > 1:
            yield Plot(title, draw_lines(lines, format_ms_axis, x_title=x_title, y_title="ms"))


def _rows(num_rows: int) -> str:
    return "1 row" if num_rows == 1 else f"{num_rows} rows"


def _columns(trace: StepTrace) -> list[Bar]:
    return [
        Bar(str(total.layer), tuple(_segments(total))) for total in totals_by_layer(trace) if total.layer is not None
    ]


def _segments(total: LayerTotal) -> Iterator[Segment]:
    for series, name in NAMES.items():
        value = sum(ns for kind, ns in total.self_ns_by_kind.items() if series_of_kind(kind) == series)
        if value:
            yield Segment(series, name, value)


def _legend(bars: list[Bar]) -> tuple[tuple[str, str], ...]:
    """Of the colours that the bars have, in the order in which they are stacked."""
    seen = {segment.series for bar in bars for segment in bar.segments}
    return tuple((series, name) for series, name in NAMES.items() if series in seen)


def format_ms_axis(duration_ns: float) -> str:
    return f"{duration_ns / 1e6:g}"

"""An inspection as plain text."""

from __future__ import annotations

from collections.abc import Iterator

from model_worker.inspection.flowchart import Block, Flowchart, Section, layer_ranges
from model_worker.inspection.inspection import Inspection
from model_worker.inspection.quantities import format_list, format_ms, format_share
from model_worker.inspection.tables import (
    Table,
    footprint_tables,
    kinds_table,
    layers_table,
    load_tables,
    model_table,
    operations_table,
    times_table,
)


def format_text(inspection: Inspection) -> str:
    return "\n\n".join(_parts(inspection)) + "\n"


def _parts(inspection: Inspection) -> Iterator[str]:
    yield format_table(model_table(inspection.model))
    if inspection.footprint is not None:
        yield from map(format_table, footprint_tables(inspection.footprint))
    if inspection.load is not None:
        yield from map(format_table, load_tables(inspection.load))
    if inspection.trace is not None:
        yield format_table(times_table(inspection.trace))
        for trace in (inspection.trace.prefill, inspection.trace.decode):
            for table in (kinds_table(trace), layers_table(trace), operations_table(trace)):
                yield format_table(table)
    for chart in inspection.flowcharts:
        yield format_flowchart(chart)


def format_table(table: Table) -> str:
    lines = [row for row in (table.head, *table.rows) if any(row)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(table.head))]
    shown = [
        "  ".join(
            text.ljust(width) if column < table.num_text_columns else text.rjust(width)
            for column, (text, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
    return "\n".join([table.title, *(f"  {line}".rstrip() for line in shown), *(f"  ({note})" for note in table.notes)])


def format_flowchart(chart: Flowchart) -> str:
    """
    embedding    [T] → [T, 576]                     0.02 ms   0.1 %
    ┌ layers 0-29, 30 times
    │ norm       [T, 576] → [T, 576]                0.90 ms   2.1 %
    └
    """
    lines: list[str] = []
    width = max(len(_names(block)) for section in chart.sections for block in section.blocks)
    for section in chart.sections:
        if section.layers:
            lines.append(f"  ┌ layer{_times(section)}")
        edge = "│ " if section.layers else ""
        lines += [f"  {edge}{_block(block, chart.total_ns, 2 - len(edge), width)}" for block in section.blocks]
        if section.layers:
            lines.append("  └")
    return "\n".join([f"Flow of {chart.phase}, T = {chart.num_tokens} tokens", *lines])


def _times(section: Section) -> str:
    num = len(section.layers)
    return f" {section.layers[0]}" if num == 1 else f"s {layer_ranges(section.layers)}, {num} times"


def _names(block: Block) -> str:
    return format_list(block.names, most=3)


def _block(block: Block, total_ns: int, indent: int, names_width: int) -> str:
    kind = block.kind.value.ljust(16 + indent)
    names = _names(block).ljust(names_width)
    time = f"{format_ms(block.self_ns):>8} ms {format_share(block.self_ns / total_ns):>7}"
    return f"{kind}{names}{time}  {block.flow}".rstrip()

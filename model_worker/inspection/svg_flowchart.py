"""The flowchart of a model as SVG text: one box a block, a frame around what every layer repeats."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape

from model_worker.engine.model_parts import OpKind
from model_worker.inspection.flowchart import Block, Flowchart, Section, layer_ranges
from model_worker.inspection.quantities import format_list, format_ms, format_share
from model_worker.inspection.series import series_of_kind

_WIDTH = 860
_BOX_LEFT, _BOX_WIDTH, _BOX_HEIGHT = 40, 560, 40
_GAP = 16  # between boxes, where the arrow is
_FRAME_HEAD, _FRAME_FOOT = 30, 14
_HINTS = {
    OpKind.PREPARE: "token ids, positions, block tables, slots",
    OpKind.BETWEEN: "what these modules compute themselves: residuals, rotary, products, copies",
    OpKind.SAMPLE: "logits to token ids",
}
"""What blocks without shapes do."""
_TIME_LEFT, _TIME_WIDTH = _BOX_LEFT + _BOX_WIDTH + 34, 90  # the bar that shows a block's share


def draw_flowchart_svg(chart: Flowchart) -> str:
    """One column of boxes in the order of execution; beside each, its time in all layers of its section."""
    marks: list[str] = []
    y = 4.0
    longest = max(block.self_ns for section in chart.sections for block in section.blocks) or 1
    for number, section in enumerate(chart.sections):
        if number:
            marks.append(_arrow(y))
            y += _GAP
        begin = y
        y += _FRAME_HEAD if section.layers else 0
        for index, block in enumerate(section.blocks):
            if index:
                if block.kind is not OpKind.BETWEEN:  # which is no step after the others, but around them
                    marks.append(_arrow(y))
                y += _GAP
            marks += _box(block, y, chart.total_ns, longest)
            y += _BOX_HEIGHT
        if section.layers:
            y += _FRAME_FOOT
            marks.insert(0, _frame(section, begin, y))
    return f'<svg viewBox="0 0 {_WIDTH} {y + 4:g}" role="img">{"".join(marks)}</svg>'


def _frame(section: Section, top: float, bottom: float) -> str:
    num = len(section.layers)
    label = f"layer{'s' if num > 1 else ''} {layer_ranges(section.layers)}" + (f", {num} times" if num > 1 else "")
    return (
        f'<rect x="{_BOX_LEFT - 20}" y="{top:g}" width="{_BOX_WIDTH + 40}" height="{bottom - top:g}" rx="10" '
        f'class="frame"/><text x="{_BOX_LEFT - 6}" y="{top + 19:g}" class="strong">{escape(label)}</text>'
    )


def _box(block: Block, y: float, total_ns: int, longest_ns: int) -> Iterator[str]:
    colour = f"var(--series-{series_of_kind(block.kind)})"
    names = format_list(block.names, most=99)
    flow = block.flow or _HINTS[block.kind]
    yield f"<g><title>{escape(f'{block.kind.value}: {names}')}</title>"
    yield (
        f'<rect x="{_BOX_LEFT}" y="{y:g}" width="{_BOX_WIDTH}" height="{_BOX_HEIGHT}" rx="6" class="box"/>'
        f'<rect x="{_BOX_LEFT}" y="{y:g}" width="6" height="{_BOX_HEIGHT}" rx="3" fill="{colour}"/>'
    )
    yield f'<text x="{_BOX_LEFT + 16}" y="{y + 17:g}" class="strong">{escape(block.kind.value)}</text>'
    if names != block.kind.value:
        yield _right(_BOX_LEFT + _BOX_WIDTH - 12, y + 17, _cut(names, 62), "small")
    style = "small mono" if block.flow else "small"
    yield f'<text x="{_BOX_LEFT + 16}" y="{y + 33:g}" class="{style}">{escape(_cut(flow, 84))}</text>'
    width = max(block.self_ns / longest_ns * _TIME_WIDTH, 1)
    yield f'<rect x="{_TIME_LEFT}" y="{y + 11:g}" width="{width:.1f}" height="18" rx="2" fill="{colour}"/>'
    time = f"{format_ms(block.self_ns)} ms, {format_share(block.self_ns / total_ns)}"
    yield f'<text x="{_TIME_LEFT + width + 6:.1f}" y="{y + 24:g}" class="small">{escape(time)}</text></g>'


def _arrow(y: float) -> str:
    x = _BOX_LEFT + _BOX_WIDTH / 2
    tip = y + _GAP
    return (
        f'<line x1="{x}" x2="{x}" y1="{y:g}" y2="{tip - 5:g}" class="arrow"/>'
        f'<path d="M{x - 4} {tip - 6:g} L{x + 4} {tip - 6:g} L{x} {tip:g} Z" class="tip"/>'
    )


def _right(x: float, y: float, text: str, style: str) -> str:
    return f'<text x="{x:g}" y="{y:g}" text-anchor="end" class="{style}">{escape(text)}</text>'


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"

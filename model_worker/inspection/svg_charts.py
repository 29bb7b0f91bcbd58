"""Plots as SVG text, without scripts: stacked bars, stacked columns and lines.

Colours are CSS variables that the page defines for light and dark, `--series-NAME`; hovering shows each value, as the
`<title>` of its mark.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

_WIDTH = 860
_BAR, _BAR_GAP = 22, 12
_LABEL_WIDTH, _TOTAL_WIDTH = 130, 120
_PLOT_HEIGHT = 220
_MAX_COLUMN = 64
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 130, 12, 40


@dataclass(frozen=True, slots=True)
class Segment:
    """A part of a bar; `series` names its colour."""

    series: str
    name: str
    value: float


@dataclass(frozen=True, slots=True)
class Bar:
    label: str
    segments: tuple[Segment, ...]

    @property
    def total(self) -> float:
        return sum(segment.value for segment in self.segments)


@dataclass(frozen=True, slots=True)
class Line:
    """Points (x, y) that belong together; x ascends and is positive."""

    series: str
    name: str
    points: tuple[tuple[float, float], ...]


def draw_bars(bars: Sequence[Bar], show: Callable[[float], str]) -> str:
    """Horizontal bars on one scale, each with its total at the right."""
    height = len(bars) * (_BAR + _BAR_GAP)
    longest = max(bar.total for bar in bars) or 1.0
    scale = (_WIDTH - _LABEL_WIDTH - _TOTAL_WIDTH) / longest
    marks: list[str] = []
    for index, bar in enumerate(bars):
        y = index * (_BAR + _BAR_GAP) + _BAR_GAP / 2
        marks.append(_text(_LABEL_WIDTH - 10, y + _BAR / 2, bar.label, anchor="end"))
        x = float(_LABEL_WIDTH)
        for segment in bar.segments:
            width = segment.value * scale
            marks.append(_rect(x, y, width, _BAR, segment, f"{bar.label}, {segment.name}: {show(segment.value)}"))
            x += width
        marks.append(_text(x + 8, y + _BAR / 2, show(bar.total)))
    return _svg(_WIDTH, height, marks)


def draw_columns(columns: Sequence[Bar], show: Callable[[float], str], *, x_title: str, y_title: str) -> str:
    """Vertical stacked bars on one scale."""
    highest = max(column.total for column in columns) or 1.0
    width = min((_WIDTH - _LEFT - 10) / len(columns), _MAX_COLUMN)
    scale = _PLOT_HEIGHT / highest
    marks = list(_linear(highest).draw(show, right=_LEFT + width * len(columns)))
    labelled = max(1, math.ceil(len(columns) / 24))  # every so many; more would not be legible
    for index, column in enumerate(columns):
        x, y = _LEFT + index * width, float(_TOP + _PLOT_HEIGHT)
        for segment in column.segments:
            height = segment.value * scale
            y -= height
            hint = f"{column.label}, {segment.name}: {show(segment.value)}"
            marks.append(_rect(x + 1, y, max(width - 2, 1), height, segment, hint))
        if index % labelled == 0:
            marks.append(_text(x + width / 2, _TOP + _PLOT_HEIGHT + 14, column.label, anchor="middle", small=True))
    marks += _axis_titles(x_title, y_title)
    return _svg(_WIDTH, _TOP + _PLOT_HEIGHT + _BOTTOM, marks)


def draw_lines(
    lines: Sequence[Line], show: Callable[[float], str], *, x_title: str, y_title: str, log_y: bool = False
) -> str:
    """Lines over a logarithmic x axis, their names at their right ends, or above these where others go on.

    Args:
        log_y: the y axis is logarithmic too; every y is positive.
    """
    all_x = sorted({x for line in lines for x, _ in line.points})
    all_y = [y for line in lines for _, y in line.points]
    axis = _logarithmic(min(all_y), max(all_y)) if log_y else _linear(max(all_y) or 1.0)
    span = math.log(all_x[-1] / all_x[0]) or 1.0
    right = _WIDTH - _RIGHT

    def place(x: float, y: float) -> tuple[float, float]:
        left_share = math.log(x / all_x[0]) / span if all_x[-1] > all_x[0] else 0.5
        return _LEFT + 12 + left_share * (right - _LEFT - 24), axis.place(y)

    marks = list(axis.draw(show, right=right))
    for x in all_x:
        marks.append(_text(place(x, all_y[0])[0], _TOP + _PLOT_HEIGHT + 14, f"{x:g}", anchor="middle", small=True))
    complete = [line for line in lines if line.points[-1][0] == all_x[-1]]
    ends = _spread([place(*line.points[-1])[1] for line in complete], 15)
    marks += [_text(right, end_y, line.name) for line, end_y in zip(complete, ends, strict=True)]
    for line in lines:
        colour = f"var(--series-{line.series})"
        places = [place(x, y) for x, y in line.points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        marks.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for (x, y), (at_x, at_y) in zip(line.points, places, strict=True):
            hint = escape(f"{line.name}, {x_title} {x:g}: {show(y)}")
            marks.append(
                f'<circle cx="{at_x:.1f}" cy="{at_y:.1f}" r="4" fill="{colour}"><title>{hint}</title></circle>'
            )
        if line not in complete:
            marks.append(_text(places[-1][0], places[-1][1] - 13, line.name, anchor="middle"))
    marks += _axis_titles(x_title, y_title)
    return _svg(_WIDTH, _TOP + _PLOT_HEIGHT + _BOTTOM, marks)


def _spread(places: Sequence[float], distance: float) -> list[float]:
    """The places, moved down where they are closer than `distance`, so that labels do not cover each other."""
    moved = list(places)
    order = sorted(range(len(places)), key=lambda index: places[index])
    for above, below in pairwise(order):
        moved[below] = max(moved[below], moved[above] + distance)
    return moved


@dataclass(frozen=True, slots=True)
class _YAxis:
    """Attributes: share: of the height, for a value. ticks: values with a line and a number."""

    share: Callable[[float], float]
    ticks: Sequence[float]

    def place(self, value: float) -> float:
        return _TOP + _PLOT_HEIGHT * (1 - self.share(value))

    def draw(self, show: Callable[[float], str], *, right: float) -> Iterator[str]:
        for tick in self.ticks:
            y = self.place(tick)
            yield f'<line x1="{_LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>'
            yield _text(_LEFT - 8, y, show(tick), anchor="end", small=True)


def _linear(highest: float) -> _YAxis:
    """From 0, with three to six round numbers up to `highest`."""
    power = 10.0 ** math.floor(math.log10(highest))
    step = next(power * factor for factor in (0.2, 0.25, 0.5, 1.0, 2.0) if highest / (power * factor) < 6)
    return _YAxis(lambda value: value / highest, [index * step for index in range(int(highest / step) + 1)])


def _logarithmic(lowest: float, highest: float) -> _YAxis:
    """From the 1, 2 or 5 times a power of ten at or below `lowest` to that at or above `highest`."""
    powers = range(math.floor(math.log10(lowest)) - 1, math.ceil(math.log10(highest)) + 1)
    steps = [factor * 10.0**power for power in powers for factor in (1, 2, 5)]
    begin = max(step for step in steps if step <= lowest)
    end = min(step for step in steps if step >= highest and step > begin)
    ticks = [step for step in steps if begin <= step <= end]
    return _YAxis(lambda value: math.log(value / begin) / math.log(end / begin), ticks)


def _axis_titles(x_title: str, y_title: str) -> list[str]:
    turned = f'transform="translate(12 {_TOP + _PLOT_HEIGHT / 2}) rotate(-90)" text-anchor="middle" class="small"'
    return [
        _text((_LEFT + _WIDTH) / 2, _TOP + _PLOT_HEIGHT + 32, x_title, anchor="middle", small=True),
        f"<text {turned}>{escape(y_title)}</text>",
    ]


def _rect(x: float, y: float, width: float, height: float, segment: Segment, hint: str) -> str:
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(width, 0):.1f}" height="{height:.1f}" '
        f'fill="var(--series-{segment.series})" class="mark"><title>{escape(hint)}</title></rect>'
    )


def _text(x: float, y: float, text: str, *, anchor: str = "start", small: bool = False) -> str:
    style = ' class="small"' if small else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" dy="0.35em" text-anchor="{anchor}"{style}>{escape(text)}</text>'


def _svg(width: float, height: float, marks: Sequence[str]) -> str:
    return f'<svg viewBox="0 0 {width:g} {height:g}" role="img">{"".join(marks)}</svg>'

"""Where marks are on a plot."""

from __future__ import annotations

import re

import pytest

from model_worker.inspection.svg_charts import Line, draw_lines

TOP, HEIGHT = 12, 220


def _heights(values: list[float], *, log_y: bool) -> list[float]:
    """Of the points above the x axis, as shares of the plot's height."""
    line = Line("a", "a", tuple((2.0**index, value) for index, value in enumerate(values)))
    svg = draw_lines([line], lambda value: f"{value:g}", x_title="x", y_title="y", log_y=log_y)
    return [1 - (float(y) - TOP) / HEIGHT for y in re.findall(r'<circle cx="[\d.]+" cy="([\d.]+)"', svg)]


def _ticks(values: list[float], *, log_y: bool) -> list[str]:
    line = Line("a", "a", tuple((2.0**index, value) for index, value in enumerate(values)))
    svg = draw_lines([line], lambda value: f"{value:g}", x_title="x", y_title="y", log_y=log_y)
    return re.findall(r'text-anchor="end" class="small">([^<]*)<', svg)


def test_a_linear_axis_begins_at_zero() -> None:
    assert _heights([0.0, 25.0, 100.0], log_y=False) == pytest.approx([0.0, 0.25, 1.0], abs=0.001)
    assert _ticks([0.0, 25.0, 100.0], log_y=False) == ["0", "20", "40", "60", "80", "100"]


def test_equal_factors_are_equal_distances_on_a_logarithmic_axis() -> None:
    assert _heights([1.0, 10.0, 100.0], log_y=True) == pytest.approx([0.0, 0.5, 1.0], abs=0.001)
    assert _ticks([1.0, 10.0, 100.0], log_y=True) == ["1", "2", "5", "10", "20", "50", "100"]


@pytest.mark.parametrize("values", [[0.03, 0.031], [7.0, 7.0], [999.0, 1001.0], [20.0, 50.0]])
def test_a_logarithmic_axis_encloses_its_values(values: list[float]) -> None:
    assert all(-0.001 <= height <= 1.001 for height in _heights(values, log_y=True))
    first, *_, last = map(float, _ticks(values, log_y=True))
    assert first <= min(values)
    assert last >= max(values)

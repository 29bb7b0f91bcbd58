"""What the benchmarks for GPUs found: figures, each with its target, as JSON and as a table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Figure:
    """One result.

    Attributes:
        name: what was measured.
        value: the result; None: it could not be measured, and `detail` says why.
        unit: of value and target.
        target: least value that is wanted, or most; None: the figure is there to explain others.
        detail: what the value was made of.
        at_most: the value should not be above the target.
    """

    name: str
    value: float | None
    unit: str
    target: float | None = None
    detail: str = ""
    at_most: bool = False

    @property
    def met(self) -> bool | None:
        """Whether the target is reached; None: there is none, or nothing to compare with it."""
        if self.value is None or self.target is None:
            return None
        return self.value <= self.target if self.at_most else self.value >= self.target

    @property
    def verdict(self) -> str:
        if self.value is None:
            return "not measured"
        return {True: "met", False: "MISSED", None: ""}[self.met]


def write_figures(figures: Sequence[Figure], path: Path) -> None:
    """As JSON; what was there is replaced."""
    path.write_text(json.dumps([asdict(figure) for figure in figures], indent=1))


def read_figures(path: Path) -> list[Figure]:
    """What `write_figures` wrote; nothing where there is no file."""
    return [Figure(**entry) for entry in json.loads(path.read_text())] if path.is_file() else []


def format_table(figures: Sequence[Figure]) -> str:
    """Name, target, value, verdict and detail in columns."""
    rows = [("", "target", "measured", "", "")]
    for figure in figures:
        target = "" if figure.target is None else f"{'≤' if figure.at_most else '≥'} {_number(figure.target)}"
        value = "-" if figure.value is None else f"{_number(figure.value)} {figure.unit}"
        rows.append((figure.name, target, value, figure.verdict, figure.detail))
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


class Findings:
    """The figures of a benchmark, written after each one, so that one that is stopped leaves what it has found.

    Args:
        path: of the JSON file; None: there is none.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._figures: list[Figure] = []

    def add(self, figure: Figure) -> None:
        self._figures.append(figure)
        if self._path is not None:
            write_figures(self._figures, self._path)

    def table(self) -> str:
        """See `format_table`."""
        return format_table(self._figures)


def _number(value: float) -> str:
    """Three digits that mean something."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"

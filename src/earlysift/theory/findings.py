"""What an experiment found, as data: a sentence, tables, a chart.

The page, the pictures and the JSON are made from it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from earlysift.report.chart import Axis, Measure, Trace
from earlysift.report.series import Style

POINTS = "points"  # the list of a trace's points, by the name that charts look for

Cell = str | float | int | None
Line = tuple[Sequence[float], Sequence[Sequence[float]]]
"""Where a line was read, and its values there: one sequence, or several that make a band."""


@dataclass(frozen=True)
class Table:
    """Numbers under headings."""

    title: str
    headers: tuple[str, ...]
    rows: Sequence[tuple[Cell, ...]]


@dataclass(frozen=True)
class Chart:
    """Lines over one horizontal axis; a reader chooses among the measures."""

    measures: tuple[Measure, ...]
    axis: Axis
    traces: list[Trace]
    note: str


@dataclass(frozen=True)
class Finding:
    """One experiment."""

    name: str
    title: str
    summary: str
    """What was found, with its numbers, in a sentence or two."""
    tables: list[Table]
    chart: Chart


def measure(label: str, **levels: float) -> Measure:
    """A vertical quantity, framed whole, with lines across at some heights."""
    return Measure(label, levels={name.replace("_", " "): level for name, level in levels.items()}, whole=True)


def trace(label: str, style: Style, lines: Mapping[int, Line], measures: int, *, shown: bool = True) -> Trace:
    """One line of a chart, in those measures that it has values of.

    Args:
        label: What to call it.
        style: How it looks.
        lines: By number of the measure.
        measures: How many measures the chart has.
        shown: Whether a reader sees it at first.

    Example:
        >>> trace("SGD", Style("#737b86"), {1: ([0, 1], [[3.0, 2.0]])}, 2).runs
        [{'points': [{'x': 0.0, 'y1': 3.0}, {'x': 1.0, 'y1': 2.0}]}]
    """
    most = max(len(values) for _, values in lines.values())
    runs: list[dict[str, Any]] = [{POINTS: []} for _ in range(most)]
    for m, (xs, values) in lines.items():
        for run, ys in zip(runs, values, strict=False):
            run[POINTS] += [{"x": float(x), f"y{m}": float(y)} for x, y in zip(xs, ys, strict=True)]
    return Trace(label, style, runs, tuple(f"y{m}" if m in lines else None for m in range(measures)), shown)


def log10(values: Tensor) -> list[float]:
    """Logarithms for a chart, those of zero cut at 1e-30."""
    return [math.log10(max(value, 1e-30)) for value in values.tolist()]


def numbers(finding: Finding) -> dict[str, Any]:
    """What was found, as plain data: the summary and the tables."""
    return {
        "title": finding.title,
        "summary": finding.summary,
        "tables": {
            table.title: {"headers": list(table.headers), "rows": [list(row) for row in table.rows]}
            for table in finding.tables
        },
    }


def curves(finding: Finding) -> dict[str, Any]:
    """The points of a finding's chart, as plain data: for each line, the points of each of its runs."""
    return {
        "x": finding.chart.axis.label,
        "measures": [each.label for each in finding.chart.measures],
        "lines": {line.label: [run[POINTS] for run in line.runs] for line in finding.chart.traces},
    }


def show_cell(cell: Cell) -> str:
    """A cell as text: a dash for nothing, four digits of a fraction.

    Example:
        >>> [show_cell(cell) for cell in (None, 3, 0.123456, 12345.6, "T1", math.inf)]
        ['–', '3', '0.1235', '12,346', 'T1', 'never']
    """
    if cell is None:
        return "–"
    if isinstance(cell, str):
        return cell
    if isinstance(cell, int):
        return f"{cell:,}"
    if math.isinf(cell):
        return "never"
    return f"{cell:,.0f}" if abs(cell) >= 1000 else f"{cell:.4g}"

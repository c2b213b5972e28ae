"""What an experiment is given and what it finds, as data from which page, pictures and JSON are made."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from earlysift.report.chart import Trace
from earlysift.report.series import Style

POINTS = "points"  # key of a run's list of points, under which charts find it
UNIFORM, GREEDY, EXACT = (Style(color, strong=True) for color in ("#737b86", "#d9581f", "#2f7fd6"))

Show = Callable[[float], None]
"""Called with the share of the experiment that is done."""
Cell = str | float | int | None
Row = tuple[Cell, ...]
Lines = dict[str, dict[int, tuple[Sequence[float], Sequence[Sequence[float]]]]]
"""Lines by label and by number of the measure: horizontal positions, and one sequence of values or several, a band."""


@dataclass(frozen=True)
class Options:
    """What every experiment is given."""

    seed: int
    results: Path | None
    """Folder with results of `earlysift compare`, to draw into the payoff map."""
    effort: float
    """Factor of the numbers of seeds, instances and steps; 1 is what the documents quote, tests use less."""

    def count(self, full: int) -> int:
        """Number of seeds or instances at this effort, at least two."""
        return max(2, round(self.effort * full))

    def steps(self, full: int) -> int:
        """Number of steps of a run at this effort, at least a tenth."""
        return max(full // 10, round(self.effort * full))


@dataclass(frozen=True)
class Table:
    """Numbers under headings."""

    title: str
    headers: tuple[str, ...]
    rows: Sequence[Row]


@dataclass(frozen=True)
class Finding:
    """The outcome of one experiment: what was found in a sentence or two, tables, and a chart.

    The chart has one horizontal axis, and a reader chooses among its measures: ``levels`` holds the label of each and
    its horizontal lines. Lines have their styles in order; at first those are shown whose label contains ``shown``.
    """

    name: str
    title: str
    summary: str
    tables: list[Table]
    levels: Mapping[str, dict[str, float | None]]
    axis_label: str
    lines: Lines
    styles: Sequence[Style]
    note: str
    shown: str = ""

    @property
    def traces(self) -> list[Trace]:
        """The lines as the report draws them: a run for each sequence of values, with ``y{m}`` for measure m."""
        traces = []
        for (label, line), style in zip(self.lines.items(), self.styles, strict=False):
            runs: list[dict[str, Any]] = [{POINTS: []} for _ in range(max(len(values) for _, values in line.values()))]
            for m, (xs, values) in line.items():
                for run, ys in zip(runs, values, strict=False):
                    run[POINTS] += [{"x": float(x), f"y{m}": float(y)} for x, y in zip(xs, ys, strict=True)]
            keys = tuple(f"y{m}" if m in line else None for m in range(len(self.levels)))
            traces.append(Trace(label, style, runs, keys, self.shown in label))
        return traces


def log10(values: Tensor) -> list[float]:
    """Logarithms for a chart, where 0 becomes that of 1e-30."""
    return [math.log10(max(value, 1e-30)) for value in values.tolist()]


def numbers(finding: Finding) -> dict[str, Any]:
    """Title, summary and tables as plain data."""
    tables = {table.title: {"headers": table.headers, "rows": table.rows} for table in finding.tables}
    return {"title": finding.title, "summary": finding.summary, "tables": tables}


def curves(finding: Finding) -> dict[str, Any]:
    """The points of a finding's chart as plain data, for each run of each line."""
    lines = {line.label: [run[POINTS] for run in line.runs] for line in finding.traces}
    return {"x": finding.axis_label, "measures": list(finding.levels), "lines": lines}


def show_cell(cell: Cell) -> str:
    """A cell as text: a dash for None, four digits of a fraction.

    Example:
        >>> [show_cell(cell) for cell in (None, 3, 0.123456, 12345.6, "T1", math.inf)]
        ['–', '3', '0.1235', '12,346', 'T1', 'never']
    """
    if cell is None or isinstance(cell, str):
        return "–" if cell is None else cell
    if math.isinf(cell):
        return "never"
    return f"{cell:,.0f}" if isinstance(cell, int) or abs(cell) >= 1000 else f"{cell:.4g}"

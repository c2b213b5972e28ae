"""Findings -> one self-contained HTML page, a picture of each as PNG and SVG, and all numbers as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from earlysift import folders
from earlysift.files import write_whole
from earlysift.report.chart import Axis, Measure, explorer, switch_css
from earlysift.report.figures import FAINT, SETTINGS
from earlysift.report.page import document
from earlysift.report.series import band
from earlysift.report.tables import row, table
from earlysift.theory.findings import POINTS, Finding, Table, curves, numbers, show_cell

if TYPE_CHECKING:
    from matplotlib.figure import Figure

VERSION, PROGRAM = 1, "theory"
NUMBERS, CURVES, PAGE = "theory.json", "curves.json", "theory.html"
PICTURE_COLUMNS = 3


def render(findings: list[Finding], facts: str) -> str:
    """The whole page, with one line of ``facts`` on what was run; equal findings give equal text."""
    sections = "\n".join(_section(finding) for finding in findings)
    body = f"""<article><header><p class="eyebrow">earlysift theory</p>
<h1>What selection promises, and what was measured</h1>
<p class="facts">{escape(facts)}</p></header>
{sections}</article>"""
    measures = max((len(finding.levels) for finding in findings), default=0)
    lines = max((len(finding.lines) for finding in findings), default=0)
    return document("earlysift theory", body, switch_css(measures=measures, axes=1, lines=lines))


def require_own(out: Path) -> None:
    """Raise FileExistsError unless a folder is absent, empty or holds earlier findings; OSError if not writable."""
    folders.require_available(out)
    occupied = out.is_dir() and any(out.iterdir())
    if occupied and folders.marker(out).get("program") != PROGRAM:
        raise FileExistsError(
            f"The folder {out} holds files that earlysift theory did not write. Choose another --out."
        )


def write(findings: list[Finding], out: Path, settings: Mapping[str, Any], facts: str) -> Path:
    """Write page, pictures and numbers into a folder, each file whole or not at all, and return the page's path.

    The ``settings`` that were requested go into the JSON, the line of ``facts`` on what was run into the page. Raises
    as `require_own`.
    """
    require_own(out)
    out.mkdir(parents=True, exist_ok=True)
    folders.mark(out, PROGRAM)
    tables = {"version": VERSION, **settings, "findings": {each.name: numbers(each) for each in findings}}
    points = {"version": VERSION, **settings, "charts": {each.name: curves(each) for each in findings}}
    for finding in findings:
        drawn = picture(finding)
        for form in ("png", "svg"):
            write_whole(out / f"{finding.name}.{form}", partial(_save, drawn, form))
    texts = {NUMBERS: json.dumps(tables, indent=1) + "\n", CURVES: json.dumps(points) + "\n"}
    for name, text in {**texts, PAGE: render(findings, facts)}.items():
        write_whole(out / name, partial(Path.write_text, data=text, encoding="utf-8"))
    return out / PAGE


def picture(finding: Finding) -> Figure:
    """The chart of a finding, a panel for each measure."""
    import matplotlib
    from matplotlib.figure import Figure

    count, traces = len(finding.levels), finding.traces
    columns = min(count, PICTURE_COLUMNS)
    rows = -(-count // columns)
    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(4.6 * columns, 3.6 * rows + 0.6), layout="constrained")
        panels = figure.subplots(rows, columns, squeeze=False).flatten()
        legend: dict[str, Any] = {}
        for m, (axes, (measure, levels)) in enumerate(zip(panels, finding.levels.items(), strict=False)):
            for line in traces:
                key = line.keys[m]
                drawn = band(line.runs, POINTS, "x", key) if key else None
                if drawn is None:
                    continue
                dashes = tuple(float(length) for length in line.style.dashes.split())
                look: dict[str, Any] = {"color": line.style.color, "linestyle": (0, dashes) if dashes else "-"}
                axes.plot(drawn.x, drawn.mean, label=line.label, marker="o" if len(drawn.x) == 1 else "", **look)
                axes.fill_between(drawn.x, drawn.low, drawn.high, color=line.style.color, alpha=0.15, linewidth=0)
            for level in levels.values():
                axes.axhline(level, color=FAINT, linewidth=1, linestyle="--")
            axes.set(xlabel=finding.axis_label, ylabel=measure)
            handles, labels = axes.get_legend_handles_labels()
            legend |= dict(zip(labels, handles, strict=True))
        for axes in panels[count:]:
            axes.set_axis_off()
        figure.legend(legend.values(), legend.keys(), loc="outside upper left", ncols=min(len(legend), 1 + columns))
    return figure


def _save(figure: Figure, form: str, path: Path) -> None:
    import matplotlib

    # Without a date, and with fixed names of its parts, the same figure gives the same bytes.
    metadata = {"png": {"Software": None}, "svg": {"Date": None}}[form]
    with matplotlib.rc_context({**SETTINGS, "svg.hashsalt": "earlysift"}):
        figure.savefig(path, format=form, dpi=120, metadata=metadata)


def _section(finding: Finding) -> str:
    measures = [Measure(label, levels=levels, whole=True) for label, levels in finding.levels.items()]
    drawing = explorer(finding.name, POINTS, measures, (Axis("x", finding.axis_label),), finding.traces)
    tables = "".join(f"<h3>{escape(each.title)}</h3>{_table(each)}" for each in finding.tables)
    return (
        f'<section id="{finding.name}"><h2>{escape(finding.title)}</h2><p>{escape(finding.summary)}</p>'
        f'{drawing}<p class="note">{escape(finding.note)}</p>{tables}</section>'
    )


def _table(shown: Table) -> str:
    headers = [escape(header) for header in shown.headers]
    rows = [row([escape(show_cell(cell)) for cell in cells], headers) for cells in shown.rows]
    return table(escape(shown.title), "numbers cards", headers, rows)

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
from earlysift.report.chart import explorer, switch_css
from earlysift.report.figures import SETTINGS
from earlysift.report.page import document
from earlysift.report.series import band
from earlysift.report.tables import row, table
from earlysift.theory.findings import POINTS, Chart, Finding, Table, curves, numbers, show_cell

if TYPE_CHECKING:
    from matplotlib.figure import Figure

VERSION = 1
PROGRAM = "theory"
NUMBERS, CURVES, PAGE = "theory.json", "curves.json", "theory.html"
PICTURE_COLUMNS = 3


def render(findings: list[Finding], facts: str) -> str:
    """The whole page; equal findings give equal text.

    Args:
        findings: What the experiments found.
        facts: One line on what was run.
    """
    sections = "\n".join(_section(finding) for finding in findings)
    body = f"""<article><header><p class="eyebrow">earlysift theory</p>
<h1>What selection promises, and what was measured</h1>
<p class="facts">{escape(facts)}</p></header>
{sections}</article>"""
    most = max((len(finding.chart.measures) for finding in findings), default=0)
    lines = max((len(finding.chart.traces) for finding in findings), default=0)
    return document("earlysift theory", body, switch_css(measures=most, axes=1, lines=lines))


def require_own(out: Path) -> None:
    """See whether findings may go into a folder: one that is empty, or not there, or that findings were written to.

    Raises:
        FileExistsError: If it holds anything else.
        OSError: If nothing can be written there.
    """
    folders.require_available(out)
    occupied = out.is_dir() and any(out.iterdir())
    if occupied and folders.marker(out).get("program") != PROGRAM:
        raise FileExistsError(
            f"The folder {out} holds files that earlysift theory did not write. Choose another --out."
        )


def write(findings: list[Finding], out: Path, settings: Mapping[str, Any], facts: str) -> Path:
    """Write page, pictures and numbers into a folder, each whole or not at all.

    Args:
        findings: What the experiments found.
        out: The folder; made if need be.
        settings: What was asked for, for the JSON.
        facts: One line on what was run, for the page.

    Returns:
        The path of the page.

    Raises:
        FileExistsError: If the folder holds files of others.
    """
    require_own(out)
    out.mkdir(parents=True, exist_ok=True)
    folders.mark(out, PROGRAM)
    tables = {"version": VERSION, **settings, "findings": {each.name: numbers(each) for each in findings}}
    points = {"version": VERSION, **settings, "charts": {each.name: curves(each) for each in findings}}
    for name, content, indent in ((NUMBERS, tables, 1), (CURVES, points, None)):
        text = json.dumps(content, indent=indent) + "\n"
        write_whole(out / name, partial(_write_text, text))
    for finding in findings:
        drawn = picture(finding.chart)
        for form in ("png", "svg"):
            write_whole(out / f"{finding.name}.{form}", partial(_save, drawn, form))
    page = render(findings, facts)
    write_whole(out / PAGE, partial(_write_text, page))
    return out / PAGE


def picture(chart: Chart) -> Figure:
    """The chart as a figure, a panel for each measure."""
    import matplotlib
    from matplotlib.figure import Figure

    count = len(chart.measures)
    columns = min(count, PICTURE_COLUMNS)
    lines = -(-count // columns)
    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(4.6 * columns, 3.6 * lines + 0.6), layout="constrained")
        panels = figure.subplots(lines, columns, squeeze=False).flatten()
        for m, (axes, measured) in enumerate(zip(panels, chart.measures, strict=False)):
            for line in chart.traces:
                key = line.keys[m]
                drawn = band(line.runs, POINTS, "x", key) if key else None
                if drawn is None:
                    continue
                dashes = tuple(float(length) for length in line.style.dashes.split())
                look: dict[str, Any] = {"color": line.style.color, "linestyle": (0, dashes) if dashes else "-"}
                axes.plot(drawn.x, drawn.mean, label=line.label, marker="o" if len(drawn.x) == 1 else "", **look)
                axes.fill_between(drawn.x, drawn.low, drawn.high, color=line.style.color, alpha=0.15, linewidth=0)
            for level in measured.levels.values():
                axes.axhline(level, color="#8a8a8a", linewidth=1, linestyle="--")
            axes.set_ylabel(measured.label)
            axes.set_xlabel(chart.axis.label)
        for axes in panels[count:]:
            axes.set_axis_off()
        legend = {
            label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        figure.legend(legend.values(), legend.keys(), loc="outside upper left", ncols=min(len(legend), 1 + columns))
    return figure


def _write_text(text: str, path: Path) -> None:
    path.write_text(text, encoding="utf-8")


def _save(figure: Figure, form: str, path: Path) -> None:
    import matplotlib

    # Without a date and with fixed names of its parts, the same figure gives the same bytes.
    metadata = {"png": {"Software": None}, "svg": {"Date": None}}[form]
    with matplotlib.rc_context({**SETTINGS, "svg.hashsalt": "earlysift"}):
        figure.savefig(path, format=form, dpi=120, metadata=metadata)


def _section(finding: Finding) -> str:
    chart = finding.chart
    drawing = explorer(finding.name, POINTS, chart.measures, (chart.axis,), chart.traces)
    tables = "".join(f"<h3>{escape(each.title)}</h3>{_table(each)}" for each in finding.tables)
    return (
        f'<section id="{finding.name}"><h2>{escape(finding.title)}</h2><p>{escape(finding.summary)}</p>'
        f'{drawing}<p class="note">{escape(chart.note)}</p>{tables}</section>'
    )


def _table(shown: Table) -> str:
    headers = [escape(header) for header in shown.headers]
    rows = [row([escape(show_cell(cell)) for cell in cells], headers) for cells in shown.rows]
    return table(escape(shown.title), "numbers cards", headers, rows)

"""From the results of a comparison to `curves.png`, where HTML cannot be shown; equal results give equal bytes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from earlysift.report.series import (
    Results,
    Style,
    band,
    frame,
    items,
    label,
    number,
    numbers,
    prominent,
    section,
    sections,
    seeds,
    styles,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROWS = (("accuracy", "validation accuracy"), ("loss", "validation loss"))
COLUMNS = (
    ("reference_s", "reference time (s)"),
    ("wall_s", "wall time (s)"),
    ("trained_samples", "trained samples"),
    ("step", "steps"),
)
FAINT = "#8a8a8a"
SETTINGS: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": FAINT,
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9.5,
    "grid.color": "#e8e8e8",
    "legend.frameon": False,
    "legend.handlelength": 3,  # room for dashes
    "text.parse_math": False,  # a "$" in a name is a dollar sign
    "text.usetex": False,
}


def curves_figure(results: Results) -> Figure:
    """Validation accuracy and loss against reference time, wall time, trained samples and steps.

    Args:
        results: The content of `results.json`.

    Returns:
        Two rows of panels, with one panel for each measured horizontal quantity. Lines are means over seeds; prominent
        arms have a band from their lowest to their highest seed.
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter, StrMethodFormatter

    arms, shown = sections(results, "arms"), prominent(results)
    points = [point for arm in arms.values() for run in seeds(arm) for point in items(run, "curve")]
    columns = [(x, x_label) for x, x_label in COLUMNS if numbers(point.get(x) for point in points)] or COLUMNS
    formats = {"accuracy": PercentFormatter(1.0), "loss": StrMethodFormatter("{x:.4g}")}
    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(1 + 3 * len(columns), 6.6), layout="constrained")
        grid = figure.subplots(2, len(columns), sharex="col", sharey="row", squeeze=False)
        for panels, (y, y_label) in zip(grid, ROWS, strict=True):
            target = number(section(results, "target").get(y))
            drawn = []
            for axes, (x, _) in zip(panels, columns, strict=True):
                for (name, arm), style in zip(arms.items(), styles(arms).values(), strict=True):
                    curve = band(seeds(arm), "curve", x, y)
                    if curve is None:
                        continue
                    drawn.append((curve, name in shown))
                    axes.plot(curve.x, curve.mean, label=label(name, arm), **_line(style))
                    if name in shown:
                        axes.fill_between(curve.x, curve.low, curve.high, color=style.color, alpha=0.15, linewidth=0)
                if target is not None:
                    axes.axhline(target, color=FAINT, linewidth=1.2, linestyle="--", zorder=1, label="target")
            if drawn:
                panels[0].set_ylim(frame(drawn, [] if target is None else [target], whole=len(arms) == 1))
            panels[0].set_ylabel(y_label)
            panels[0].yaxis.set_major_formatter(formats[y])
        for axes, (_, x_label) in zip(grid[-1], columns, strict=True):
            axes.set_xlabel(x_label)
            axes.set_xlim(left=0)
            axes.locator_params(axis="x", nbins=4)
            axes.xaxis.set_major_formatter("{x:,.9g}")
        handles, labels = grid[0, 0].get_legend_handles_labels()
        if handles:
            figure.legend(handles, labels, loc="outside upper left", ncols=min(len(handles), 8))
    return figure


def save_png(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, for any suffix of the path."""
    import matplotlib

    with matplotlib.rc_context(SETTINGS):
        figure.savefig(path, format="png", dpi=150, metadata={"Software": None})


def _line(style: Style) -> dict[str, object]:
    dashes = tuple(float(length) for length in style.dashes.split())
    return {
        "color": style.color,
        "linestyle": (0, dashes) if dashes else "-",
        "linewidth": 3.4 if style.beneath else 2 if style.strong else 1,
        "zorder": 2 if style.beneath else 2.2 if style.strong else 2.1,
    }

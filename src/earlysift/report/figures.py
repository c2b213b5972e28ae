"""Results of a comparison -> figures, drawn off screen and the same bytes every time.

All functions take the dictionary that `results.json` holds. A run that was stopped leaves parts of it out, so
every look-up allows for absence: what is missing is not drawn.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Results = dict[str, Any]
Line = tuple[list[float], list[float]]

# Okabe and Ito's colours: told apart by colour-blind readers too.
COLORS = {"uniform": "#4d4d4d", "sift": "#0072b2", "exact": "#d55e00"}
FURTHER_COLORS = ("#009e73", "#cc79a7", "#56b4e9", "#8c6d1f")
INK, FAINT = "#333333", "#8a8a8a"

CURVE_ROWS = (("accuracy", "validation accuracy", "{x:.1%}"), ("loss", "validation loss", "{x:.4g}"))
CURVE_COLUMNS = (
    ("reference_s", "reference time (s)"),
    ("wall_s", "wall time (s)"),
    ("trained_samples", "backpropagated samples"),
    ("step", "steps"),
)
LEVELS: dict[str, dict[str, Any]] = {
    "target": {"label": "target", "linestyle": "--"},
    "unigram": {"label": "no context (unigram)", "linestyle": ":"},
}
FIDELITY_PANELS = (
    ("rank_correlation", "rank correlation with the exact loss"),
    ("overlap", "overlap of the kept sets"),
    ("gain", "gain: loss of the kept / of the pool"),
)

STYLE = {
    "axes.axisbelow": True,
    "axes.edgecolor": FAINT,
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.constrained_layout.w_pad": 0.1,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9.5,
    "grid.color": "#e8e8e8",
    "legend.frameon": False,
    "svg.fonttype": "none",
    "text.color": INK,
    "text.parse_math": False,  # a "$" in a name is a dollar sign
    "text.usetex": False,
    "xtick.color": INK,
    "ytick.color": INK,
}


def number(value: Any) -> float | None:
    """The value if it is a finite number, else None: results hold null, and NaN where a run diverged."""
    return value if isinstance(value, int | float) and math.isfinite(value) else None


def numbers(values: Iterable[Any]) -> list[float]:
    """Those values that are finite numbers."""
    return [value for value in values if number(value) is not None]


def section(parent: Results, name: str) -> Results:
    """A dictionary inside the results, empty where a partial run left it out."""
    return parent.get(name) or {}


def sections(parent: Results, name: str) -> dict[str, Results]:
    """A dictionary of dictionaries inside the results, such as the arms."""
    return {key: part or {} for key, part in section(parent, name).items()}


def arm_colors(results: Results) -> dict[str, str]:
    """Colour of each arm, in the order of the results: fixed for known arms, from a palette for others."""
    further = cycle(FURTHER_COLORS)
    return {name: COLORS.get(name) or next(further) for name in section(results, "arms")}


def curves_figure(results: Results) -> Figure:
    """Validation accuracy and loss against reference time, wall time, backpropagated samples and steps.

    Args:
        results: what `results.json` holds.

    Returns:
        Two rows of four panels: bold lines are means over seeds, thin lines single seeds.
    """
    with _figure("curves", 13, 6.2) as figure:
        grid = figure.subplots(2, 4, sharex="col", sharey="row")
        for panels, (y, y_label, y_format) in zip(grid, CURVE_ROWS, strict=True):
            levels = {part: number(section(results, part).get(y)) for part in LEVELS}
            known = {part: level for part, level in levels.items() if level is not None}
            for axes, (x, _) in zip(panels, CURVE_COLUMNS, strict=True):
                _draw_arms(axes, results, "curve", x, y)
                for part, level in known.items():
                    axes.axhline(level, color=FAINT, linewidth=1.2, zorder=1, **LEVELS[part])
            _frame_late_part(panels[0], results, y, list(known.values()))
            panels[0].set_ylabel(y_label)
            panels[0].yaxis.set_major_formatter(y_format)
        for axes, (_, x_label) in zip(grid[-1], CURVE_COLUMNS, strict=True):
            _label_x(axes, x_label)
        _add_legend(figure, grid[0, 0])
    return figure


def fidelity_figure(results: Results) -> Figure:
    """How well the scores rank like the exact loss: rank correlation, overlap and gain against the step.

    Args:
        results: what `results.json` holds.

    Returns:
        One row of three panels; the dotted line is what picking at random would give.
    """
    # Random picks: uncorrelated with the loss, share `keep` of the exact picks, and lose what the pool loses.
    by_chance = {"rank_correlation": 0, "overlap": number(section(results, "config").get("keep")), "gain": 1}
    with _figure("fidelity", 13, 3.4) as figure:
        grid = figure.subplots(1, 3)
        for axes, (y, title) in zip(grid, FIDELITY_PANELS, strict=True):
            _draw_arms(axes, results, "fidelity", "step", y)
            if axes.lines and by_chance[y] is not None:
                axes.axhline(by_chance[y], color=FAINT, linestyle=":", linewidth=1.2, label="random picks")
            axes.set_title(title, loc="left", fontsize="medium")
            _label_x(axes, "steps")
        _add_legend(figure, grid[0])
    return figure


def cost_figure(results: Results) -> Figure:
    """What one step costs in each arm, relative to uniform's step, split into choosing and training.

    Args:
        results: what `results.json` holds.

    Returns:
        One horizontal bar per arm whose cost is known.
    """
    from matplotlib.patches import Patch

    arms, colors = sections(results, "arms"), arm_colors(results)
    costs = {name: number(arm.get("step_cost_ms")) for name, arm in arms.items()}
    bars = {name: cost for name, cost in costs.items() if cost}
    unit = bars.get("uniform")
    train = number(sections(results, "operations_ms").get("train", {}).get("median"))
    with _figure("cost", 8, 1.3 + 0.5 * max(len(bars), 1)) as figure:
        axes = figure.subplots()
        axes.grid(visible=False, axis="y")
        if unit is None or train is None:
            _say_empty(axes)
            return figure
        for row, (name, cost) in enumerate(bars.items()):
            # A step is one training operation; whatever it costs beyond that went into choosing the samples.
            training = min(train, cost)
            axes.barh(row, training / unit, color=colors[name], height=0.6)
            axes.barh(row, (cost - training) / unit, left=training / unit, color=colors[name], alpha=0.4, height=0.6)
            axes.annotate(
                f"{cost / unit:.2f}×  ({cost:,.2f} ms)",
                (cost / unit, row),
                xytext=(6, 0),
                textcoords="offset points",
                verticalalignment="center",
            )
        axes.set_yticks(range(len(bars)), [_label(name, arms[name]) for name in bars])
        axes.invert_yaxis()
        axes.set_xlim(0, 1.3 * max(bars.values()) / unit)  # room for the text beside the longest bar
        axes.set_xlabel("cost of one step, relative to uniform")
        parts = [
            Patch(color=INK, label="train"),
            Patch(color=INK, alpha=0.4, label="score (choose the samples)"),
        ]
        figure.legend(handles=parts, loc="outside upper left", ncols=2)
    return figure


def save_png(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, whatever the suffix of the path."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        figure.savefig(path, format="png", dpi=150, metadata={"Software": None})


def to_svg(figure: Figure) -> str:
    """The `<svg>` element of a figure, for use inside an HTML page: text stays text, and no date goes in."""
    import matplotlib

    # Elements that refer to each other get hashed names; the figure's name keeps two figures of a page apart.
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": figure.get_label()}), io.StringIO() as out:
        figure.savefig(out, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
        text = out.getvalue()
    # The names of groups ("axes_1") would repeat from figure to figure, and nothing refers to them.
    return re.sub(r'<g id="[^"]*"', "<g", text[text.index("<svg") :]).strip()


@contextmanager
def _figure(name: str, width: float, height: float) -> Iterator[Figure]:
    """A new figure (inches), in the style of the report while the block runs."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        yield Figure(figsize=(width, height), layout="constrained", label=name)


def _draw_arms(axes: Axes, results: Results, kind: str, x: str, y: str) -> None:
    """Draw every arm's seeds (thin) and their mean (bold), or say that there is nothing to draw."""
    colors = arm_colors(results)
    for name, arm in sections(results, "arms").items():
        lines = _lines(arm, kind, x, y)
        for xs, ys in lines:
            axes.plot(xs, ys, color=colors[name], linewidth=0.8, alpha=0.4)
        if lines:
            axes.plot(*_mean_line(lines), color=colors[name], linewidth=2, label=_label(name, arm))
    if not axes.lines:
        _say_empty(axes)


def _lines(arm: Results, kind: str, x: str, y: str) -> list[Line]:
    """One line per seed that has points."""
    lines = []
    for run in arm.get("runs") or []:
        points = [(point.get(x), point.get(y)) for point in run.get(kind) or []]
        points = [(a, b) for a, b in points if number(a) is not None and number(b) is not None]
        if points:
            lines.append(([a for a, _ in points], [b for _, b in points]))
    return lines


def _mean_line(lines: list[Line]) -> tuple[Any, Any]:
    """Mean over seeds where all of them have been: seeds differ in wall time, so they are read at equal x."""
    import numpy as np

    start, stop = max(xs[0] for xs, _ in lines), min(xs[-1] for xs, _ in lines)
    grid = np.unique([x for xs, _ in lines for x in xs if start <= x <= stop])
    return grid, np.mean([np.interp(grid, xs, ys) for xs, ys in lines], axis=0)


def _frame_late_part(axes: Axes, results: Results, y: str, levels: list[float]) -> None:
    """Fit the y axis to all but the first tenth of the curves, whose steep part would flatten the rest."""
    values = list(levels)
    for arm in sections(results, "arms").values():
        for _, ys in _lines(arm, "curve", "step", y):
            values += ys[len(ys) // 10 :]
    if values:
        margin = 0.05 * (max(values) - min(values)) or 0.05
        axes.set_ylim(min(values) - margin, max(values) + margin)


def _label(name: str, arm: Results) -> str:
    """An arm's label, cut and freed of control characters: a label must not crowd out or break a figure."""
    label = str(arm.get("label") or name)[:40]
    return "".join(character if character.isprintable() else "\ufffd" for character in label)


def _label_x(axes: Axes, label: str) -> None:
    axes.set_xlabel(label)
    axes.locator_params(axis="x", nbins=4)
    axes.xaxis.set_major_formatter("{x:,.9g}")


def _add_legend(figure: Figure, axes: Axes) -> None:
    """One legend for all panels, above them."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside upper left", ncols=len(handles))


def _say_empty(axes: Axes) -> None:
    axes.set_axis_off()
    axes.text(0.5, 0.5, "nothing measured yet", transform=axes.transAxes, color=FAINT, horizontalalignment="center")

"""Results of benchmarks to pictures, in the style of the report's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from earlysift.report.figures import FAINT, SETTINGS, save_png
from earlysift.report.series import band, label, seeds, styles
from earlysift.report.tables import GAIN, HARM
from workloads import Row, longest_s, seed_count

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_OURS, _OTHER = "#2f7fd6", "#d9581f"
_GROUP = 0.85  # of the height of a shape, which its depths share
THEMES = {
    "light": ("#1f2328", "#e4e6e9"),
    "dark": ("#e6edf3", "#30363d"),
}  # text and grid; the background is the page's
_MARKS = {GAIN: (_OURS, "^"), HARM: (_OTHER, "v")}  # colour and shape; every other verdict has the last
_NO_MARK = (FAINT, "o")
_WIDTH, _ROW = 7.6, 0.142  # inches of the picture of speed-ups, and of each of its rows
_ABOVE, _BELOW = 1.6, 2.6  # rows that the legend and the axis take
_BETWEEN = 1.9  # rows from one workload to the next, the heading among them
_SMALL = 6.8  # size of its notes
_TICKS = (0.5, 0.7, 1, 1.4, 2)
_LABEL_GAP = 0.075  # least distance of two labels at the right, as a share of the height of the axes


def verdict_picture(results: dict[str, Any], arms: Iterable[str], theme: str, path: Path) -> None:
    """Validation accuracy over reference time as an SVG for one colour scheme, each line labelled with its verdict.

    Args:
        results: Content of a results.json, judged.
        arms: The arms to draw, in this order.
        theme: A key of `THEMES`.
        path: Where the picture goes.
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    text, grid = THEMES[theme]
    colors = dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), text) | {"grid.color": grid}
    with matplotlib.rc_context(SETTINGS | colors | {"svg.hashsalt": path.name, "axes.grid.axis": "y"}):
        figure = Figure(figsize=(8, 3.9), layout="constrained")
        axes = figure.subplots()
        look, ends = styles(results["arms"]), {}
        for name in arms:
            if (line := band(seeds(results["arms"][name]), "curve", "reference_s", "accuracy")) is None:
                continue
            style = look[name]
            dashes = (0, tuple(map(float, style.dashes.split()))) if style.dashes else "-"
            axes.plot(line.x, line.mean, color=style.color, linestyle=dashes, linewidth=4 if style.beneath else 2)
            axes.fill_between(line.x, line.low, line.high, color=style.color, alpha=0.15, linewidth=0)
            ends[name] = line.mean[-1]
        target = results["target"]["accuracy"]
        axes.axhline(target, color=FAINT, linewidth=1.2, linestyle="--", zorder=1)
        axes.annotate("target", (0, target), (4, 4), textcoords="offset points", color=FAINT)
        axes.set_xlim(0, longest_s(results))
        # Where all arms end far above nought, only the last part of the way tells them apart.
        bottom = max(0.0, target - 6 * max(abs(end - target) for end in ends.values()))
        axes.set_ylim(bottom, min(1.0, axes.get_ylim()[1]))
        height, top = float("-inf"), axes.get_ylim()[1]
        for name in sorted(ends, key=lambda name: ends[name]):
            height = max(ends[name], height + _LABEL_GAP * (top - bottom))
            verdict = results["comparison"].get(name, {}).get("verdict", "").partition(":")[0].lower()
            words = label(name, results["arms"][name]) + f": {verdict}" * bool(verdict)
            place = (1.015, (height - bottom) / (top - bottom))
            axes.annotate(words, place, xycoords="axes fraction", va="center", color=look[name].color, weight="bold")
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.set_xlabel("reference time, every cost charged (s)")
        axes.set_title(f"{results['data']['name']}: validation accuracy", loc="left", fontsize=10)
        count = seed_count(results)
        axes.annotate(
            f"lines: mean of {count} seeds; bands: lowest to highest seed",
            (1, 0),
            (-4, 5),
            xycoords="axes fraction",
            textcoords="offset points",
            ha="right",
            fontsize=8,
            color=FAINT,
        )
        figure.savefig(path, format="svg", transparent=True, metadata={"Date": None})


def speedup_picture(workloads: Mapping[str, Sequence[Row]], theme: str, path: Path) -> None:
    """Speed-ups with their intervals as an SVG for one colour scheme: a block of rows per workload, in two columns.

    Args:
        workloads: Rows by the name of their workload, both in the order in which they are drawn.
        theme: A key of `THEMES`.
        path: Where the picture goes.
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    text, _ = THEMES[theme]
    columns = _two_columns(workloads)
    depth = max(sum(len(workloads[name]) + _BETWEEN for name in names) for names in columns)
    rows = [row for names in columns for name in names for row in workloads[name] if row.speedup]
    lowest = min([_TICKS[0], *(row.low or row.speedup or 1 for row in rows)])
    limits = lowest / 1.35, 1.04 * max([_TICKS[-1], *(row.high or row.speedup or 1 for row in rows)])
    colors = dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), text)
    small = {"font.size": 7.6, "svg.hashsalt": path.name, "axes.grid": False, "axes.spines.left": False}
    with matplotlib.rc_context(SETTINGS | colors | small):
        height = _ABOVE + depth + _BELOW
        figure = Figure(figsize=(_WIDTH, _ROW * height))
        for place, names in enumerate(columns):
            axes = figure.add_axes((0.5 * place + 0.19, _BELOW / height, 0.3, depth / height))
            axes.set(xscale="log", xlim=limits, ylim=(depth - 0.7, -0.7))
            axes.set_xticks(_TICKS, [f"{tick:g}" for tick in _TICKS])
            axes.minorticks_off()
            axes.tick_params(left=False, length=2)
            axes.set_yticks(*_draw_rows(axes, {name: workloads[name] for name in names}, THEMES[theme]))
            axes.set_xlabel("speed-up over uniform training (log scale)")
        words = {"gain": _MARKS[GAIN], "harm": _MARKS[HARM], "neither": _NO_MARK}
        marks = [
            Line2D([], [], color=color, marker=mark, markersize=4, linewidth=1.2, label=word)
            for word, (color, mark) in words.items()
        ]
        missed = Line2D([], [], color=FAINT, marker="o", fillstyle="none", markersize=4, linewidth=0)
        missed.set_label("hollow, at the left edge: did not arrive on every seed")
        figure.legend(handles=[*marks, missed], loc="upper left", ncols=4, handlelength=1.8, borderaxespad=0.2)
        figure.savefig(path, format="svg", transparent=True, metadata={"Date": None})


def _draw_rows(
    axes: Axes, workloads: Mapping[str, Sequence[Row]], theme: tuple[str, str]
) -> tuple[list[float], list[str]]:
    """Draw blocks of rows from the top down; positions and labels of the rows."""
    text, grid = theme
    heights: list[float] = []
    labels: list[str] = []
    top = 0.0
    for name, rows in workloads.items():
        title, _, rest = name.partition(", ")
        across = axes.get_yaxis_transform()
        axes.text(-0.61, top, title, transform=across, va="center", weight="bold")
        axes.text(1, top, rest, transform=across, va="center", ha="right", color=FAINT, fontsize=_SMALL)
        for tick in _TICKS:
            color, width = (text, 0.9) if tick == 1 else (grid, 0.8)
            axes.plot([tick, tick], [top + 0.5, top + len(rows) + 0.5], color=color, linewidth=width, zorder=1)
        for y, row in enumerate(rows, start=1):
            height = top + y
            color, mark = _MARKS.get(row.outcome, _NO_MARK)
            if row.speedup is None:
                axes.plot(0.02, height, mark, markersize=4, fillstyle="none", color=color, transform=across)
                axes.text(0.055, height, row.note, va="center", fontsize=_SMALL, color=color, transform=across)
            else:
                axes.plot([row.low or row.speedup, row.high or row.speedup], [height] * 2, color=color, linewidth=1.2)
                axes.plot(row.speedup, height, mark, markersize=4, color=color)
            heights.append(height)
            labels.append(row.label)
        top += len(rows) + _BETWEEN
    return heights, labels


def _two_columns(workloads: Mapping[str, Sequence[Row]]) -> list[list[str]]:
    """Names for the left and the right, in their order, so that the longer column is as short as can be."""
    names = list(workloads)
    sizes = [len(rows) + _BETWEEN for rows in workloads.values()]
    left = min(range(len(names) + 1), key=lambda count: max(sum(sizes[:count]), sum(sizes[count:])))
    return [names[:left], names[left:]]


def score_picture(entries: dict[str, Any], path: Path) -> None:
    """Achieved FLOP/s of scoring and of its roof: a group per shape, a line per depth."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(9, 1.2 + 0.85 * len(entries)), layout="constrained")
        axes = figure.subplots()
        for place, entry in enumerate(entries.values()):
            rate_of = {row["operation"]: row["gflops_per_s"] for row in entry["rows"]}
            depths = [name.removeprefix("roof, ") for name in rate_of if name.startswith("roof, ")]
            for number, depth in enumerate(depths):
                y = place + _GROUP * (number - (len(depths) - 1) / 2) / len(depths)
                ours, roof = rate_of[f"score, {depth}"], rate_of[f"roof, {depth}"]
                axes.plot([ours, roof], [y, y], color=FAINT, linewidth=1)
                axes.plot(ours, y, "o", color=_OURS, markersize=4, label="scoring" if place + number == 0 else None)
                axes.plot(roof, y, "|", color=_OTHER, markersize=9, label="roof" if place + number == 0 else None)
                axes.annotate(
                    depth, (max(ours, roof), y), (6, -2.5), textcoords="offset points", fontsize=6, color=FAINT
                )
        axes.set_yticks(range(len(entries)), list(entries))
        axes.invert_yaxis()
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:,.9g}")
        axes.minorticks_off()
        axes.margins(x=0.12)
        axes.set_xlabel("GFLOP/s (what costs.py counts, over the time)")
        figure.legend(loc="outside upper left", ncols=2)
    save_png(figure, path)


def hazard_picture(entries: dict[str, Any], path: Path) -> None:
    """Loss at the end over uniform training's: a panel per hazard, a line per arm."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, FormatStrFormatter, NullLocator

    hazards = list(dict.fromkeys(entry["hazard"] for entry in entries.values()))
    looks = {"greedy": (_OTHER, "-"), "greedy, guarded": (_OTHER, "--"), "unbiased": (_OURS, "-"), "auto": ("k", "-")}
    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(8, 3.2), layout="constrained")
        grid = figure.subplots(1, len(hazards), squeeze=False, sharey=True)[0]
        for axes, hazard in zip(grid, hazards, strict=True):
            of_hazard = [entry for entry in entries.values() if entry["hazard"] == hazard]
            for arm, (color, dashes) in looks.items():
                ends = [row["end"] for entry in of_hazard for row in entry["arms"] if row["arm"] == arm]
                sizes = [f"{entry['size']:g}" for entry in of_hazard]
                axes.plot(sizes, ends, dashes, color=color, marker="o", markersize=4, label=arm)
            axes.axhline(1, color=FAINT, linewidth=1)
            axes.set_xlabel(hazard)
        grid[0].set_yscale("log")
        grid[0].yaxis.set_major_locator(FixedLocator([0.5, 0.7, 1, 1.4, 2, 3, 5]))
        grid[0].yaxis.set_major_formatter(FormatStrFormatter("%g"))
        grid[0].yaxis.set_minor_locator(NullLocator())
        grid[0].set_ylabel("loss at the end, over uniform's")
        handles, labels = grid[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=len(looks))
    save_png(figure, path)


def scale_picture(entries: dict[str, Any], path: Path) -> None:
    """Measured and predicted overhead: a row per entry, a panel per quantity that was varied."""
    import matplotlib
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(row["varied"] for entry in entries.values() for row in entry["rows"]))
    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(2.1 * len(names), 0.6 + 2.2 * len(entries)), layout="constrained")
        grid = figure.subplots(len(entries), len(names), squeeze=False, sharey="row")
        for panels, (entry_name, entry) in zip(grid, entries.items(), strict=True):
            for axes, name in zip(panels, names, strict=True):
                rows = [row for row in entry["rows"] if row["varied"] == name]
                values = [row["value"].replace(", ", "\n") for row in rows]
                axes.plot(values, [row["overhead"] for row in rows], "o-", color=_OURS, markersize=4, label="measured")
                axes.plot(values, [row["predicted"] for row in rows], "--", color=_OTHER, label="predicted")
                axes.set_xlabel(name)
            panels[0].set_ylabel(f"{entry_name}\noverhead", fontsize=8)
            panels[0].set_ylim(bottom=0)
        handles, labels = grid[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=2)
    save_png(figure, path)

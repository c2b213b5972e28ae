"""Results of benchmarks to pictures, in the style of the report's."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from earlysift.report.figures import FAINT, SETTINGS, save_png
from earlysift.report.series import band, label, seeds, styles

_OURS, _OTHER = "#2f7fd6", "#d9581f"
_GROUP = 0.85  # of the height of a shape, which its depths share
THEMES = {
    "light": ("#1f2328", "#e4e6e9"),
    "dark": ("#e6edf3", "#30363d"),
}  # text and grid; the background is the page's
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
        axes.set_xlim(0, results["config"]["budget"])
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
        count = results["config"]["seeds"]
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

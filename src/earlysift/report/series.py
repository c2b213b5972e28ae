"""Results of a comparison -> what is drawn: the look of every arm, and its seeds as a mean line within a band.

All functions take parts of the dictionary that `results.json` holds. A run that was stopped leaves parts of it out,
so every look-up allows for absence: what is missing is not drawn.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import cycle, product
from typing import Any

Results = dict[str, Any]


@dataclass(frozen=True)
class Style:
    """How one line looks: a colour that reads on white and on black, dashes in pixels ("" is solid), its weight.

    A line that is ``beneath`` is drawn first and wider, so that lines of equal course on top of it leave it visible.
    """

    color: str
    dashes: str = ""
    strong: bool = False
    beneath: bool = False


# The arms that a reader looks for first. The cost-free ideal wears the colour of the costly one.
STYLES = {
    "uniform": Style("#737b86", strong=True, beneath=True),
    "sift": Style("#2f7fd6", strong=True),
    "auto": Style("#159a6c", "9 4", strong=True),
    "exact": Style("#d9581f", strong=True),
    "free": Style("#d9581f", "2 3"),
}
FURTHER_COLORS = ("#9166d6", "#a9713a", "#1493a3", "#cf4f8e", "#8f8420", "#6478c8", "#5a8a2f")
FURTHER_STYLES = tuple(Style(color, dashes) for dashes, color in product(("7 3", "2 3", "9 3 2 3"), FURTHER_COLORS))
# Lines that are no arms.
LINES = tuple(
    Style(color, dashes, strong=True)
    for dashes, color in product(("", "7 3"), ("#2f7fd6", "#d9581f", "#159a6c", *FURTHER_COLORS))
)
SHOWN_AT_FIRST = 5
_LARGEST = 1e100  # larger numbers overflow when axes are scaled


def number(value: Any) -> float | None:
    """The value if it is a number that can be drawn, else None: results hold null, and NaN where a run diverged."""
    return value if isinstance(value, int | float) and abs(value) < _LARGEST else None


def numbers(values: Iterable[Any]) -> list[float]:
    """Those values that are finite numbers."""
    return [value for value in values if number(value) is not None]


def mean(values: Iterable[Any]) -> float | None:
    """Mean of those values that are finite numbers; None if there are none."""
    finite = numbers(values)
    return math.fsum(finite) / len(finite) if finite else None


def section(parent: Results, name: str) -> Results:
    """A dictionary inside the results, empty where a partial run left it out."""
    return parent.get(name) or {}


def sections(parent: Results, name: str) -> dict[str, Results]:
    """A dictionary of dictionaries inside the results, such as the arms."""
    return {key: part or {} for key, part in section(parent, name).items()}


def items(parent: Results, name: str) -> list[Results]:
    """A list of dictionaries inside the results, such as the points of a curve."""
    return [part or {} for part in parent.get(name) or []]


def seeds(arm: Results) -> list[Results]:
    """The runs of an arm that may be compared: those that finished; all of them as long as none has."""
    runs = items(arm, "runs")
    return [run for run in runs if run.get("finished")] or runs


def plain(value: object) -> str:
    """A value as one line of text without control characters, which would break a figure or a page."""
    text = " ".join(str(value).split())
    return "".join(character if character.isprintable() else "\ufffd" for character in text)


def label(name: str, arm: Results) -> str:
    """An arm's label, cut: it must not crowd out a figure."""
    return plain(arm.get("label") or name)[:40]


def styles(names: Iterable[str]) -> dict[str, Style]:
    """Look of each arm, in the order given: fixed for known arms, from a palette for others."""
    further = cycle(FURTHER_STYLES)
    return {name: STYLES.get(name) or next(further) for name in names}


def prominent(results: Results) -> set[str]:
    """The arms to show at first: the ones that a reader looks for, then those with the best final accuracy."""
    look = styles(section(results, "arms"))

    def rank(name: str) -> tuple[bool, bool, float]:
        arm = section(results, "arms")[name] or {}
        final = mean(run.get("final_accuracy") for run in seeds(arm))
        # What is not charged is a bound and no rival: it comes last.
        return not look[name].strong, arm.get("charged") is False, -(final or 0)

    return set(sorted(look, key=rank)[:SHOWN_AT_FIRST])


@dataclass(frozen=True)
class Band:
    """One quantity over the seeds of an arm: where it was read, its mean, and its lowest and highest seed there."""

    x: list[float]
    mean: list[float]
    low: list[float]
    high: list[float]


def band(runs: list[Results], kind: str, x: str, y: str) -> Band | None:
    """The seeds of an arm as one band, from where all of them have begun to where the first one ends.

    Seeds differ in steps and wall time, so they are read at equal x, linearly between their points.

    Args:
        runs: One dictionary per seed.
        kind: Which of its lists of points: ``curve``, ``fidelity`` or ``control``.
        x: Key of the horizontal quantity of a point.
        y: Key of the vertical quantity of a point.

    Returns:
        The band; None if no seed has a point.

    Example:
        >>> runs = [{"curve": [{"step": 0, "loss": 9}, {"step": 2, "loss": 5}]}, {"curve": [{"step": 1, "loss": 8}]}]
        >>> band(runs, "curve", "step", "loss")
        Band(x=[1.0], mean=[7.5], low=[7.0], high=[8.0])
    """
    import numpy as np

    lines = []
    for run in runs:
        points = [(point.get(x), point.get(y)) for point in items(run, kind)]
        points = [(a, b) for a, b in points if number(a) is not None and number(b) is not None]
        if points:
            lines.append(list(zip(*points, strict=True)))
    if not lines:
        return None
    start, stop = max(xs[0] for xs, _ in lines), min(xs[-1] for xs, _ in lines)
    grid = np.unique([float(a) for xs, _ in lines for a in xs if start <= a <= stop])
    values = np.array([np.interp(grid, xs, ys) for xs, ys in lines])
    if not len(grid):  # seeds that share no stretch
        return None
    return Band(grid.tolist(), *(reduced.tolist() for reduced in (values.mean(0), values.min(0), values.max(0))))


def frame(bands: list[tuple[Band, bool]], levels: Iterable[float] = (), whole: bool = False) -> tuple[float, float]:
    """Bottom and top of a chart, from all but the first quarter of the curves, whose steep part would flatten the rest.

    Args:
        bands: What is drawn, and whether it is shown at first. Others may stretch the frame to three times its height
            at most: an arm that went astray must not flatten those that did not.
        levels: Heights that must lie within.
        whole: Whether the first quarter counts, too.

    Returns:
        Bottom and top, with a margin.
    """

    def extent(wanted: list[Band]) -> tuple[float, float]:
        late = [
            value
            for band in wanted
            for part in (band.low, band.high)
            for value in part[0 if whole else len(part) // 4 :]
        ]
        return min((*late, *levels)), max((*late, *levels))

    every = [band for band, _ in bands]
    low, high = extent([band for band, shown in bands if shown] or every)
    lowest, highest = extent(every)
    bottom, top = max(lowest, low - (high - low)), min(highest, high + (high - low))
    margin = 0.05 * (top - bottom) or 0.05 * abs(top) or 0.05
    return bottom - margin, top + margin

"""From the results of a comparison to lines: the style of every arm, and the mean of its seeds within a band.

All functions take parts of the content of `results.json`. A stopped run omits some of them, so every look-up allows for
missing parts, which are not drawn.
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
    """The style of a line: a colour readable on white and on black, dashes in pixels ("" is solid), and a weight.

    A line that is ``beneath`` is drawn first and wider, so that it stays visible below a line of equal values.
    """

    color: str
    dashes: str = ""
    strong: bool = False
    beneath: bool = False


# The arms that a reader looks for first. The ideal without costs has the colour of the arm with costs.
STYLES = {
    "uniform": Style("#737b86", strong=True, beneath=True),
    "sift": Style("#2f7fd6", strong=True),
    "auto": Style("#159a6c", "9 4", strong=True),
    "exact": Style("#d9581f", strong=True),
    "free": Style("#d9581f", "2 3"),
}
FURTHER_COLORS = ("#9166d6", "#a9713a", "#1493a3", "#cf4f8e", "#8f8420", "#6478c8", "#5a8a2f")
FURTHER_STYLES = tuple(Style(color, dashes) for dashes, color in product(("7 3", "2 3", "9 3 2 3"), FURTHER_COLORS))
# Lines that are not arms.
LINES = tuple(
    Style(color, dashes, strong=True)
    for dashes, color in product(("", "7 3"), ("#2f7fd6", "#d9581f", "#159a6c", *FURTHER_COLORS))
)
SHOWN_AT_FIRST = 5
_LARGEST = 1e100  # larger numbers overflow when axes are scaled


def number(value: Any) -> float | None:
    """The value if it is a number that can be drawn, else None: results contain null, and NaN if a run diverged."""
    return value if isinstance(value, int | float) and abs(value) < _LARGEST else None


def numbers(values: Iterable[Any]) -> list[float]:
    """The values that are finite numbers."""
    return [value for value in values if number(value) is not None]


def mean(values: Iterable[Any]) -> float | None:
    """Mean of the values that are finite numbers; None if there are none."""
    finite = numbers(values)
    return math.fsum(finite) / len(finite) if finite else None


def section(parent: Results, name: str) -> Results:
    """A dictionary in the results; empty if missing."""
    return parent.get(name) or {}


def sections(parent: Results, name: str) -> dict[str, Results]:
    """A dictionary of dictionaries in the results, such as the arms."""
    return {key: part or {} for key, part in section(parent, name).items()}


def items(parent: Results, name: str) -> list[Results]:
    """A list of dictionaries in the results, such as the points of a curve."""
    return [part or {} for part in parent.get(name) or []]


def seeds(arm: Results) -> list[Results]:
    """The comparable runs of an arm: the finished ones, or all of them if none has finished."""
    runs = items(arm, "runs")
    return [run for run in runs if run.get("finished")] or runs


def plain(value: object) -> str:
    """A value as one line of text without control characters, which would corrupt a figure or a page."""
    text = " ".join(str(value).split())
    return "".join(character if character.isprintable() else "\ufffd" for character in text)


def label(name: str, arm: Results) -> str:
    """An arm's label, shortened to fit into a figure."""
    return plain(arm.get("label") or name)[:40]


def styles(names: Iterable[str]) -> dict[str, Style]:
    """The style of each arm, in the given order: fixed for known arms, from a palette for others."""
    further = cycle(FURTHER_STYLES)
    return {name: STYLES.get(name) or next(further) for name in names}


def prominent(results: Results) -> set[str]:
    """The arms to show at first: the main ones, then those with the best final accuracy."""
    arm_styles = styles(section(results, "arms"))

    def rank(name: str) -> tuple[bool, bool, float]:
        arm = section(results, "arms")[name] or {}
        final = mean(run.get("final_accuracy") for run in seeds(arm))
        # An arm that is not charged is a bound, not a competitor, and comes last.
        return not arm_styles[name].strong, arm.get("charged") is False, -(final or 0)

    return set(sorted(arm_styles, key=rank)[:SHOWN_AT_FIRST])


@dataclass(frozen=True)
class Band:
    """One quantity over the seeds of an arm: positions, means, and the lowest and highest seed at each position."""

    x: list[float]
    mean: list[float]
    low: list[float]
    high: list[float]


def band(runs: list[Results], kind: str, x: str, y: str) -> Band | None:
    """The seeds of an arm as one band, over the range of x that all of them cover.

    Seeds differ in steps and wall time, so they are interpolated linearly at equal x.

    Args:
        runs: One dictionary per seed.
        kind: The list of points: ``curve``, ``fidelity`` or ``control``.
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
    if not len(grid):  # the ranges of the seeds do not overlap
        return None
    return Band(grid.tolist(), *(reduced.tolist() for reduced in (values.mean(0), values.min(0), values.max(0))))


def frame(bands: list[tuple[Band, bool]], levels: Iterable[float] = (), whole: bool = False) -> tuple[float, float]:
    """Bottom and top of a chart, without the first quarter of the curves, whose steep part would flatten the rest.

    Args:
        bands: Bands, and whether they are shown at first. The others may extend the frame to at most three times its
            height, so that an arm that diverged does not flatten the rest.
        levels: Heights that must lie within.
        whole: Whether to include the first quarter.

    Returns:
        Bottom and top, with a margin.
    """

    def extent(included: list[Band]) -> tuple[float, float]:
        late = [
            value
            for band in included
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

"""From lines with seed bands to charts in HTML and SVG that a reader switches without a script.

A chart is a scalable drawing without text; its text is HTML around it. So the chart fits every screen, its text keeps
its size, and both follow the light or dark colours of the page. Radio buttons select the chart and check boxes its
lines, by the rules of `switch_css`. A browser that does not support these rules shows all charts and lines.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import pairwise

from earlysift.report.series import Band, Results, Style, band, frame, number, numbers

WIDTH, HEIGHT = 2000, 1000  # of the drawing before it is scaled; fine enough for a large screen


@dataclass(frozen=True)
class Measure:
    """A vertical quantity: its label, whether it is a share, and horizontal lines at certain heights."""

    label: str
    is_share: bool = False
    levels: dict[str, float | None] = field(default_factory=dict)
    """Name and height; the frame of the chart includes the first."""
    whole: bool = False
    """Whether the frame includes the curves from their first point; otherwise their steep start may lie outside."""


@dataclass(frozen=True)
class Axis:
    """A horizontal quantity: its key in a point, its label, and whether the axis begins at zero."""

    key: str
    label: str
    from_zero: bool = False


@dataclass(frozen=True)
class Trace:
    """One line: its seeds, and its key in the points for each measure (None: not drawn there)."""

    label: str
    style: Style
    runs: list[Results]
    keys: tuple[str | None, ...]
    shown: bool = True


def explorer(
    name: str,
    kind: str,
    measures: Sequence[Measure],
    axes: Sequence[Axis],
    traces: Sequence[Trace],
    events: Sequence[Results] = (),
) -> str:
    """Charts of measures x axes, one shown at a time, with controls to choose it and its lines.

    Args:
        name: Distinguishes the radio buttons of this explorer from others on the page.
        kind: The list of a run that contains the points.
        measures: Vertical quantities to choose from.
        axes: Horizontal quantities to choose from.
        traces: Lines.
        events: Points that are marked by vertical lines.

    Returns:
        HTML; empty if there is nothing to draw. Measures and axes without a line are not offered.
    """
    bands = {
        (m, a, t): line
        for t, trace in enumerate(traces)
        for m, key in enumerate(trace.keys)
        for a, axis in enumerate(axes)
        if key and (line := band(trace.runs, kind, axis.key, key))
    }
    drawn = sorted({t for _, _, t in bands}, key=lambda t: (not traces[t].shown, not traces[t].style.strong, t))
    used = sorted({m for m, _, _ in bands})
    used_axes = sorted({a for _, a, _ in bands})
    if not used:
        return ""
    panels = []
    for m in used:
        first_level = number(next(iter(measures[m].levels.values()), None))
        height = frame(
            [(line, traces[t].shown) for (of, _, t), line in bands.items() if of == m],
            [] if first_level is None else [first_level],
            measures[m].whole,
        )
        for a in used_axes:
            lines = {t: (traces[t].style, line) for (*of, t), line in bands.items() if of == [m, a]}
            marks = numbers(event.get(axes[a].key) for event in events)
            panels.append(f'<div class="panel m{m} x{a}">{_chart(measures[m], axes[a], lines, height, marks)}</div>')
    choices = _radios(name, "m", "Show", {m: measures[m].label for m in used})
    choices += _radios(name, "x", "against", {a: axes[a].label for a in used_axes})
    chips = "".join(_chip(t, traces[t], {m for m, _, of in bands if of == t}) for t in drawn)
    if not all(traces[t].shown for t in drawn):
        chips += '<label class="chip"><input type="checkbox" class="all"><span>all</span></label>'
    return (
        f'<div class="explorer"><div class="choices">{choices}</div><div class="card">{"".join(panels)}'
        f'<fieldset class="chips"><legend>Lines</legend>{chips}</fieldset></div></div>'
    )


def switch_css(measures: int, axes: int, lines: int) -> str:
    """Rules that hide what is not chosen, for explorers of up to this many measures, axes and lines.

    Example:
        >>> print(switch_css(1, 0, 1))
        .explorer:has(input.m0:not(:checked)) .m0:not(input) { display: none; }
        .explorer:has(input.t0:not(:checked)):not(:has(.all:checked)) g.t0 { display: none; }
    """
    chosen = [f"m{m}" for m in range(measures)] + [f"x{a}" for a in range(axes)]
    rules = [f".explorer:has(input.{c}:not(:checked)) .{c}:not(input) {{ display: none; }}" for c in chosen]
    rules += [
        f".explorer:has(input.t{t}:not(:checked)):not(:has(.all:checked)) g.t{t} {{ display: none; }}"
        for t in range(lines)
    ]
    return "\n".join(rules)


def ticks(low: float, high: float, count: int) -> list[float]:
    """About ``count`` round numbers from low to high: multiples of 1, 2 or 5 times a power of ten.

    Example:
        >>> ticks(0.13, 0.38, 5)
        [0.15, 0.2, 0.25, 0.3, 0.35]
        >>> ticks(0, 240, 4)
        [0.0, 50.0, 100.0, 150.0, 200.0]
    """
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(times * power for times in (1, 2, 5, 10) if times * power >= 0.75 * rough)
    return [round(step * k, 12) for k in range(math.ceil(low / step), math.floor(high / step) + 1)]


def swatch(style: Style) -> str:
    """A short sample of the line, for legends and tables."""
    return (
        f'<svg class="swatch" style="{_css(style)}" viewBox="0 0 24 8" aria-hidden="true">'
        '<path class="line" d="M0 4 24 4"/></svg>'
    )


def _chart(
    measure: Measure,
    axis: Axis,
    lines: dict[int, tuple[Style, Band]],
    height: tuple[float, float],
    marks: Iterable[float],
) -> str:
    """One drawing with its text, or a note if there are no lines on this axis."""
    if not lines:
        return '<p class="note">nothing measured yet</p>'
    bottom, top = height
    left = 0.0 if axis.from_zero else min(line.x[0] for _, line in lines.values())
    right = max(line.x[-1] for _, line in lines.values())
    right = right if right > left else left + 1

    def x_of(value: float) -> float:
        return (value - left) / (right - left)

    def y_of(value: float) -> float:
        return (value - bottom) / (top - bottom)

    def path(xs: Iterable[float], ys: Iterable[float]) -> str:
        points = [(round(WIDTH * x_of(x)), round(HEIGHT * (1 - y_of(y)))) for x, y in zip(xs, ys, strict=True)]
        kept = points[:1] + [after for before, after in pairwise(points) if after != before]
        return "M" + " ".join(f"{x} {y}" for x, y in kept)

    grid = ticks(bottom, top, 5)
    drawing = ['<path class="grid" d="{}"/>'.format("".join(path((left, right), (y, y)) for y in grid))]
    texts = [f'<span class="y" style="bottom:{y_of(y):.2%}">{_amount(y, measure.is_share)}</span>' for y in grid]
    texts += [f'<span class="x" style="left:{x_of(x):.2%}">{_amount(x)}</span>' for x in ticks(left, right, 4)]
    across = "".join(path((x, x), height) for x in marks)
    drawing += [f'<path class="mark" d="{across}"/>'] * bool(across)
    for name, value in measure.levels.items():
        level = number(value)
        if level is not None and bottom <= level <= top:
            drawing.append(f'<path class="level" d="{path((left, right), (level, level))}"/>')
            texts.append(f'<span class="level" style="bottom:{y_of(level):.2%}">{escape(name)}</span>')
    # Lines "beneath" are drawn first and strong ones last.
    for t, (style, line) in sorted(lines.items(), key=lambda drawn: (not drawn[1][0].beneath, drawn[1][0].strong)):
        edge = path(line.x + line.x[::-1], line.high + line.low[::-1])
        filled = f'<path class="band" d="{edge}"/>' if line.low != line.high else ""
        # A line of one point is a dot: a stroke of length zero with round ends.
        kind, d = ("dot", path(line.x, line.mean) + "h0") if len(line.x) == 1 else ("line", path(line.x, line.mean))
        drawing.append(
            f'<g class="t{t}{" beneath" * style.beneath}{" thin" * (not style.strong)}" style="{_css(style)}">{filled}'
            f'<path class="{kind}" d="{d}"/></g>'
        )
    description = f"{measure.label} against {axis.label}"
    return (
        f'<p class="y-title">{escape(measure.label)}</p><div class="chart">'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" preserveAspectRatio="none" role="img" aria-label="{escape(description)}">'
        f'{"".join(drawing)}</svg>{"".join(texts)}</div><p class="x-title">{escape(axis.label)}</p>'
    )


def _radios(name: str, kind: str, legend: str, labels: dict[int, str]) -> str:
    first = min(labels)
    if len(labels) == 1:  # nothing to choose
        return f'<input type="radio" class="{kind}{first}" checked hidden>'
    buttons = "".join(
        f'<label><input type="radio" class="{kind}{i}" name="{name}-{kind}"{" checked" * (i == first)}>'
        f"<span>{escape(text)}</span></label>"
        for i, text in labels.items()
    )
    return f'<fieldset class="pick"><legend>{legend}</legend>{buttons}</fieldset>'


def _chip(t: int, trace: Trace, measures: set[int]) -> str:
    # The chip of a line that only one measure draws is shown only with that measure.
    only = f" m{min(measures)}" if len(measures) == 1 else ""
    return (
        f'<label class="chip{only}"><input type="checkbox" class="t{t}"{" checked" * trace.shown}>'
        f"{swatch(trace.style)}<span>{escape(trace.label)}</span></label>"
    )


def _css(style: Style) -> str:
    return f"--line:{style.color}" + (f";--dashes:{style.dashes}" if style.dashes else "")


def _amount(value: float, is_share: bool = False) -> str:
    return f"{round(100 * value, 10):,.9g}%" if is_share else f"{value:,.9g}"

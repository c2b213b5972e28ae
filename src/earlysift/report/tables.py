"""From the results of a comparison to tables in HTML; every string of the results is escaped where it is inserted."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import NamedTuple

from earlysift.report.chart import swatch
from earlysift.report.series import Results, items, mean, number, numbers, plain, section, sections, seeds, styles

MISSING = "–"


class Outcome(NamedTuple):
    """The outcome of a comparison with uniform: a word, a symbol that does not rely on colour, and a CSS class."""

    word: str
    symbol: str
    css: str


GAIN, HARM = Outcome("gain", "▲", "gain"), Outcome("harm", "▼", "harm")
NO_GAIN, NOT_PROVED = Outcome("no gain", "■", "none"), Outcome("not proved", "?", "none")
# Reasons for which an entry of a comparison may withhold its verdict.
NEVER_ACTED, UNDECIDED = Outcome("never acted", "=", "none"), Outcome("could not decide", "…", "none")
NO_VERDICT = Outcome("no verdict", "×", "none")
WITHHELD = (NEVER_ACTED, UNDECIDED, NO_VERDICT)

VERDICT_HEADERS = (
    "Arm",
    "Against uniform",
    "Speed-up, reference",
    "Speed-up, wall",
    "Seeds at target",
    "Final accuracy",
    "Accuracy over uniform",
    "Final loss",
    "Loss over uniform",
)
OPERATION_HEADERS = ("Operation", "Median", "20th percentile", "80th percentile", "Timed")
DECISION_HEADERS = ("Run", "Step", "Reference time", "From", "To", "Reason")

# Colours of the bars of reference time by kind. Other kinds come last, in one colour.
KINDS = {
    "train": "#2f7fd6",
    "score": "#d9581f",
    "probe": "#9166d6",
    "lesson": "#c2528b",
    "reference model": "#159a6c",
    "read": "#8f8420",
}
OTHER_KIND = "#808080"


def outcome(entry: Results) -> Outcome:
    """Harm if the whole interval of the final accuracy is below uniform's; gain if that of the speed-up is above 1.

    Args:
        entry: One arm of the ``comparison`` in results.json. Its ``withheld`` takes precedence over its numbers.

    Example:
        >>> outcome({"speedup": 1.2, "low": 1.1, "final_accuracy_high": 0.02}).word
        'gain'
        >>> outcome({"speedup": 1.2, "low": 1.1, "final_accuracy_high": -0.01}).word
        'harm'
        >>> outcome({"withheld": "never acted", "speedup": 1.0, "low": 1.0}).word
        'never acted'
    """
    for reason in WITHHELD:
        if entry.get("withheld") == reason.word:
            return reason
    speedup, low, accuracy_high = (number(entry.get(key)) for key in ("speedup", "low", "final_accuracy_high"))
    if accuracy_high is not None and accuracy_high < 0:
        return HARM
    if low is not None:
        return GAIN if low > 1 else NO_GAIN
    return NO_GAIN if speedup is None else NOT_PROVED


def verdict_table(results: Results) -> str:
    """Every arm against uniform: its numbers, and below them its verdict in words; empty columns are omitted."""
    arms, comparison = sections(results, "arms"), sections(results, "comparison")
    has_target = number(section(results, "target").get("accuracy")) is not None
    arm_styles = styles(arms)
    lines = []
    for name, arm in arms.items():
        entry = comparison.get(name, {})
        runs = seeds(arm)
        comparison_cells = [_outcome_cell(entry) if entry else MISSING, *_speedups(entry)]
        comparison_cells += [_reached(runs) if has_target else MISSING]
        final = [_final(runs, "final_accuracy", "{:.2%}"), _over(entry, "final_accuracy", "{:+.2f}", 100, " points")]
        final += [_final(runs, "final_loss", "{:.3f}"), _over(entry, "final_loss", "{:+.3f}")]
        title = swatch(arm_styles[name]) + text(arm.get("label") or name)
        if arm.get("charged") is False:
            title += " <small>upper bound, not charged</small>"
        words = [f"<b>{text(entry['verdict'])}</b>"] if entry.get("verdict") else []
        if (hidden := number(entry.get("final_hidden_accuracy_difference"))) is not None:
            words += [f"on hidden tokens alone {100 * hidden:+.2f} points"]
        words += [text(arm[part]) for part in ("description", "source") if arm.get(part)]
        lines.append(([title, *comparison_cells, *final], " · ".join(words)))
    columns = [c for c in range(len(VERDICT_HEADERS)) if any(cells[c] != MISSING for cells, _ in lines)]
    headers = [VERDICT_HEADERS[c] for c in columns]
    bodies = [
        row([cells[c] for c in columns], headers)
        + f'<tr class="words"><td colspan="{len(columns)}">{words}</td></tr>' * bool(words)
        for cells, words in lines
    ]
    return table("Arms", "numbers cards verdicts" + " compared" * bool(comparison), headers, bodies) if bodies else ""


def spent_table(results: Results) -> str:
    """How each arm spent its time, mean over seeds, as a stacked bar and as shares; empty if unknown.

    Shares are of the budget, if there is one.
    """
    arms = sections(results, "arms")
    spent = {name: _spent_s(arm) for name, arm in arms.items()}
    kinds = [*KINDS, *sorted({kind for parts in spent.values() for kind in parts} - set(KINDS))]
    kinds = [kind for kind in kinds if any(parts.get(kind) for parts in spent.values())]
    totals = [sum(parts.values()) for parts in spent.values()]
    config = section(results, "config")
    budget_s = None if config.get("steps") else number(config.get("budget"))
    whole = budget_s or max(totals, default=0)
    if not kinds or not whole:
        return ""
    legend = "".join(f"<span>{_block(kind, '')}{text(kind)}</span>" for kind in kinds)
    headers = ("Arm", "Share of the budget" if budget_s else "Share of the time", *map(text, kinds))
    scale = max(whole, *totals)
    arm_styles = styles(arms)
    rows = []
    for name, parts in spent.items():
        if parts:
            bar = "".join(_block(kind, f"width:{parts.get(kind, 0) / scale:.2%};") for kind in kinds)
            shares = [f"{parts[kind] / whole:.1%}" if parts.get(kind) else MISSING for kind in kinds]
            title = swatch(arm_styles[name]) + text(arms[name].get("label") or name)
            rows.append(row([title, f'<div class="bar">{bar}</div>', *shares], headers))
    return f'<p class="legend">{legend}</p>' + table("Time by kind", "numbers cards spent", headers, rows)


def decisions_table(arm: Results) -> str:
    """The decisions of an arm that switches by itself, by seed; a note if it never switched."""
    rows = [
        row(
            [
                f"seed {text(run.get('seed'))}",
                show(event.get("step"), "{:,.0f}"),
                show(event.get("reference_s"), "{:,.1f} s"),
                text(event.get("from")),
                text(event.get("to")),
                text(event.get("reason")),
            ],
            DECISION_HEADERS,
        )
        for run in seeds(arm)
        for event in items(run, "events")
    ]
    if not rows:
        return '<p class="note">It never switched.</p>'
    return table("Decisions", "cards decisions", DECISION_HEADERS, rows)


def budget(config: Results) -> str:
    """What every arm could spend; empty if that is unknown.

    Example:
        >>> budget({"budget": 60.0}), budget({"budget": 60.0, "steps": 3000})
        ('60 s of reference time', '3,000 steps of uniform training')
    """
    if (steps := number(config.get("steps"))) is not None:
        return f"{steps:,g} steps of uniform training"
    seconds = number(config.get("budget"))
    return "" if seconds is None else f"{seconds:,g} s of reference time"


def overview_table(runs: Sequence[Results]) -> str:
    """A table of arms by runs (workload and budget): speed-up in reference time, final accuracy over uniform's.

    Without a comparison the cell contains the final accuracy of the arm.
    """
    labels: dict[str, str] = {}
    for results in runs:
        for name, arm in sections(results, "arms").items():
            labels.setdefault(name, text(arm.get("label") or name) + " (not charged)" * (arm.get("charged") is False))
    budgets = [budget(section(results, "config")) for results in runs]
    names = [f'<a href="#run{i}">{workload(results)}</a>' for i, results in enumerate(runs)]
    headers = ["Arm", *map(_cell, names, budgets)]
    rows = []
    for name, label in labels.items():
        cells = [_overview_cell(results, name) for results in runs]
        if any(cell != MISSING for cell in cells):
            rows.append(row([label, *cells]))
    return table("Workloads and arms", "numbers overview", headers, rows)


def operations_table(results: Results, part: str) -> str:
    """Measured times, one row per operation."""
    rows = [
        row(
            [
                text(name),
                *(show(timing.get(key), "{:,.2f} ms") for key in ("median", "low", "high")),
                show(timing.get("count"), "{:,.0f}×"),
            ]
        )
        for name, timing in sections(results, part).items()
    ]
    return table("Time of each operation", "numbers operations", OPERATION_HEADERS, rows)


def pairs_table(title: str, pairs: Results) -> str:
    """Names and values; those without a value are omitted."""
    cells = [(text(key), text(value)) for key, value in pairs.items()]
    return table(title, "", (), [row(cell) for cell in cells if cell[1] != MISSING])


def workload(results: Results) -> str:
    """The name of the data of a run, in HTML."""
    return text(section(results, "data").get("name") or "unnamed data")


def text(value: object) -> str:
    """A value of the results as one line of escaped HTML; a dash if there is none."""
    if isinstance(value, list):
        value = ", ".join(map(str, value)) or None
    elif isinstance(value, dict):
        value = ", ".join(f"{key} {part}" for key, part in value.items()) or None
    return MISSING if value is None else escape(plain(value))


def show(value: object, form: str) -> str:
    """A formatted number; a dash if the value is not a number."""
    return MISSING if number(value) is None else form.format(value)


def _speedups(entry: Results) -> list[str]:
    return [
        _cell(show(entry.get(value), "{:.2f}×"), _span(entry.get(low), entry.get(high), "{:.2f}"))
        for value, low, high in (("speedup", "low", "high"), ("wall_speedup", "wall_low", "wall_high"))
    ]


def _reached(runs: list[Results]) -> str:
    times = numbers(run.get("reference_s_to_target") for run in runs)
    return _cell(f"{len(times)} of {len(runs)}", f"mean {mean(times):,.1f} s" if times else "")


def _final(runs: list[Results], key: str, form: str) -> str:
    values = numbers(run.get(key) for run in runs)
    span = _span(min(values), max(values), form) if len(values) > 1 else ""
    return _cell(show(mean(values), form), span)


def _over(entry: Results, what: str, form: str, scale: float = 1, unit: str = "") -> str:
    """A difference to uniform and its interval."""
    ends = (number(entry.get(f"{what}_{part}")) for part in ("difference", "low", "high"))
    difference, low, high = (None if end is None else scale * end for end in ends)
    return _cell(show(difference, form + unit), _span(low, high, form))


def _outcome_cell(entry: Results) -> str:
    verdict = outcome(entry)
    return f'<span class="{verdict.css}">{verdict.symbol} {verdict.word}</span>'


def _overview_cell(results: Results, name: str) -> str:
    entry = section(section(results, "comparison"), name)
    if not entry:
        return _final(seeds(section(section(results, "arms"), name)), "final_accuracy", "{:.2%}")
    verdict, difference = outcome(entry), number(entry.get("final_accuracy_difference"))
    return _cell(
        f'<span class="{verdict.css}" title="{verdict.word}">{verdict.symbol}</span> {_speedups(entry)[0]}',
        "" if difference is None else f"{100 * difference:+.2f} points",
    )


def _spent_s(arm: Results) -> dict[str, float]:
    """Seconds of reference time by kind, mean over the seeds."""
    runs = [section(run, "spent_s") for run in seeds(arm) if run.get("spent_s")]
    kinds = dict.fromkeys(kind for run in runs for kind in run)
    return {kind: sum(numbers(run.get(kind) for run in runs)) / len(runs) for kind in kinds}


def _block(kind: str, size: str) -> str:
    return f'<i style="{size}background:{KINDS.get(kind, OTHER_KIND)}"></i>'


def table(title: str, kind: str, headers: Iterable[str], rows: Iterable[str]) -> str:
    """A table in a scrollable box."""
    head = "".join(f'<th scope="col">{header}</th>' for header in headers)
    return (
        f'<div class="card" role="region" tabindex="0" aria-label="{title}"><table class="{kind}">'
        f"{head and f'<thead><tr>{head}</tr></thead>'}<tbody>{''.join(rows)}</tbody></table></div>"
    )


def row(cells: Iterable[str], headers: Sequence[str] = ()) -> str:
    """One row of cells in HTML, the first its header. Narrow screens show the headers of the columns in each cell."""
    first, *rest = cells
    names = [f' data-label="{header}"' for header in headers[1:]] or [""] * len(rest)
    classes = [' class="missing"' if cell == MISSING else "" for cell in rest]
    body = "".join(f"<td{name}{css}>{cell}</td>" for name, css, cell in zip(names, classes, rest, strict=True))
    return f'<tr><th scope="row">{first}</th>{body}</tr>'


def _cell(main: str, small_print: str) -> str:
    return main + (f"<small>{small_print}</small>" if small_print else "")


def _span(low: object, high: object, form: str) -> str:
    """An interval; empty if an end is missing."""
    return "" if number(low) is None or number(high) is None else f"{form.format(low)} … {form.format(high)}"

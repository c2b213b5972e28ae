"""Results of a comparison -> one HTML page that needs nothing but itself: no script, no request.

The page answers in the order a reader asks: who won, by how much, how the runs went, how it was measured, on
what. Every string of the results is escaped where it enters the page.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from html import escape
from pathlib import Path
from statistics import fmean
from typing import Any

from earlysift.files import write_whole
from earlysift.report.figures import (
    Results,
    arm_colors,
    cost_figure,
    curves_figure,
    fidelity_figure,
    number,
    numbers,
    save_png,
    section,
    sections,
    to_svg,
)

RESULTS = "results.json"
RESULTS_VERSION = 1
MISSING = "–"

ARM_HEADERS = (
    "Arm",
    "Steps",
    "Cost of a step",
    "Final accuracy",
    "Accuracy over uniform",
    "Final loss",
    "Time to target",
    "Speed-up over uniform",
    "Seeds at target",
)
OPERATION_HEADERS = ("Operation", "Median", "20th percentile", "80th percentile", "Timed")

# heading, figure, what the reader sees
FIGURES = (
    (
        "Learning curves",
        curves_figure,
        "Validation accuracy and loss of every arm. Bold: mean over seeds; thin: single seeds. The first "
        "tenth of the curves may lie outside the frame, so that their ends can be told apart.",
    ),
    (
        "Fidelity of the score",
        fidelity_figure,
        "How well the score ranks like the exact loss. 1 is a perfect rank correlation or overlap; a gain "
        "of 1 means that the kept samples were no harder than the pool.",
    ),
    ("Cost of a step", cost_figure, "What choosing the samples adds to one training step."),
)

METHOD = {
    "Reference time": "Every operation is timed in this run, and an arm is charged its number of operations "
    "times their median time. Noise of the machine therefore cannot favour an arm.",
    "Equal budgets": "Every arm starts from the same weights and may spend the same reference time, once per "
    "seed. An arm whose steps cost more takes fewer of them.",
    "Learning rate": "It decays fully within each arm's own number of steps, so no arm is judged in the "
    "middle of its schedule.",
    "Evaluation": "Accuracy and loss come from held-out data in its untouched distribution, never from "
    "selected samples.",
    "Costs": "Every cost of training is charged: reading candidates, scoring them and selecting count as much as "
    "the training step itself. Evaluations, and the fidelity measured at them, are the same for all arms and free.",
    "Speed-up": "Uniform's reference time to the target over this arm's. Above 1× the arm was faster.",
}

CSS = """
:root { color-scheme: light dark; --page: #f6f7f9; --card: #fff; --ink: #16191d; --soft: #5b6470;
  --line: #dde1e6; --accent: #0072b2; --warn: #7a4b00; --warn-card: #fff1d6; }
@media (prefers-color-scheme: dark) { :root { --page: #101317; --card: #191d23; --ink: #e9ecef;
  --soft: #a3acb8; --line: #303740; --accent: #5ab4ea; --warn: #ffd489; --warn-card: #3a2c10; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.55 system-ui, sans-serif;
  overflow-wrap: anywhere; }
main { max-width: 76rem; margin: 0 auto; padding: clamp(1.25rem, 4vw, 3rem) clamp(1rem, 3vw, 2rem) 4rem; }
h1 { font-size: clamp(1.5rem, 3.6vw, 2.4rem); line-height: 1.22; letter-spacing: -.015em;
  margin: .4rem 0 .9rem; text-wrap: balance; }
h2 { font-size: 1.25rem; margin: 2.75rem 0 .75rem; }
h3 { font-size: 1rem; margin: 0 0 .5rem; }
small, figcaption, .facts, .note { color: var(--soft); }
.eyebrow { margin: 0; color: var(--accent); font-weight: 600; }
.badge { display: inline-block; margin: 0 0 .9rem; padding: .25rem .75rem; border-radius: 1rem;
  background: var(--warn-card); color: var(--warn); font-weight: 600; }
.facts { margin: 0; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; overflow-x: auto; }
.card:focus-visible { outline: 2px solid var(--accent); }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .6rem .8rem; text-align: left; vertical-align: top; }
tr + tr > *, thead + tbody > tr > * { border-top: 1px solid var(--line); }
thead th { color: var(--soft); font-size: .85rem; font-weight: 600; vertical-align: bottom; }
.numbers { overflow-wrap: normal; }
.numbers td, .numbers thead th:not(:first-child) { text-align: right; }
.numbers td { white-space: nowrap; }
.numbers small { display: block; font-weight: 400; }
.arms { min-width: 62rem; }
.arms tbody th { width: 16rem; overflow-wrap: anywhere; }
.operations { min-width: 34rem; }
.swatch { display: inline-block; width: .75em; height: .75em; margin-right: .5em; border-radius: .2em; }
figure { margin: 0; }
figcaption, .note { margin: .6rem 0 0; font-size: .9rem; max-width: 60rem; }
.plot { background: #fff; padding: .75rem; }
.plot svg { display: block; width: 100%; height: auto; }
dl, .pairs { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 15rem), 1fr));
  gap: 1rem 1.5rem; align-items: start; }
dl { grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); }
dl { margin: 0 0 1.75rem; }
dt { font-weight: 600; }
dd { margin: 0; color: var(--soft); }
.pairs th, .pairs td { padding: .35rem .8rem; font-size: .9rem; }
.pairs th { font-weight: 400; color: var(--soft); overflow-wrap: normal; }
"""


def render(results: Results) -> str:
    """The whole page.

    Args:
        results: what `results.json` holds; parts may be missing, their numbers are shown as a dash.

    Returns:
        HTML that loads nothing from anywhere; equal results give equal text.
    """
    name = escape(str(section(results, "data").get("name") or "unnamed data"))
    verdict = escape(str(results.get("verdict") or "No verdict yet"))
    badge = "Partial run: stopped early, numbers may change"
    sections = (
        ("Arms", _arms_table(results) + _levels(results)),
        *((heading, _figure(draw(results), heading, caption)) for heading, draw, caption in FIGURES),
        ("How it was measured", _method() + _operations_table(results)),
        ("The run", _run_tables(results)),
    )
    body = "\n".join(f"<section><h2>{heading}</h2>{content}</section>" for heading, content in sections)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>earlysift compare: {name}</title>
<style>{CSS}</style>
</head>
<body>
<main>
<header>
<p class="eyebrow">earlysift compare · {name}</p>
<h1>{verdict}</h1>
{"" if results.get("complete") else f'<p class="badge">{badge}</p>'}
<p class="facts">{_facts(results)}</p>
</header>
{body}
</main>
</body>
</html>
"""


def write_report(run_folder: Path) -> Path:
    """Read `results.json` of a run folder, write `curves.png` and `report.html` beside it.

    Args:
        run_folder: the folder that `earlysift compare` wrote.

    Returns:
        The path of the page.

    Raises:
        FileNotFoundError: The folder holds no results.
        ValueError: The results are damaged, or of a version that this code does not know.
    """
    results = read_results(run_folder)
    curves = curves_figure(results)
    # A path among the results may hold bytes that are no UTF-8 (lone surrogates); they must not cost the page.
    page = render(results).encode("utf-8", errors="xmlcharrefreplace")
    write_whole(run_folder / "curves.png", lambda part: save_png(curves, part))
    write_whole(run_folder / "report.html", lambda part: part.write_bytes(page))
    return run_folder / "report.html"


def read_results(run_folder: Path) -> Results:
    """The content of `results.json`, checked for damage and version; raises what `write_report` does."""
    path = run_folder / RESULTS
    if not path.is_file():
        raise FileNotFoundError(
            f"expected the results of a comparison in {path}, found no such file; "
            "give the folder that `earlysift compare` wrote"
        )
    try:
        results = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(
            f"expected JSON in {path}, found damaged or cut text ({error}); restore the file or repeat the comparison"
        ) from error
    version = results.get("version") if isinstance(results, dict) else None
    if version != RESULTS_VERSION:
        raise ValueError(
            f"expected results of version {RESULTS_VERSION} in {path}, found version {version!r}; "
            "upgrade earlysift, or read them with the version that wrote them"
        )
    return dict(results)


def _facts(results: Results) -> str:
    """One line under the headline: how much was run, where and when. What is not known is left out."""
    arms = sections(results, "arms").values()
    facts = (
        ("seeds per arm: {}", max((len(arm.get("runs") or []) for arm in arms), default=0)),
        ("{:,g} s of reference time for each", number(section(results, "config").get("budget"))),
        ("{}", section(results, "machine").get("cpu")),
        ("{}", results.get("created")),
    )
    return " · ".join(escape(form.format(value)) for form, value in facts if value)


def _arms_table(results: Results) -> str:
    colors = arm_colors(results)
    rows = [
        [_arm_header(name, arm, colors[name]), *(_cell(*lines) for lines in _arm_numbers(name, arm, results))]
        for name, arm in sections(results, "arms").items()
    ]
    return _table("Arms", "numbers arms", ARM_HEADERS, rows)


def _arm_header(name: str, arm: Results, color: str) -> str:
    swatch = f'<span class="swatch" style="background: {color}"></span>'
    return swatch + _cell(escape(str(arm.get("label") or name)), escape(str(arm.get("description") or "")))


def _arm_numbers(name: str, arm: Results, results: Results) -> list[tuple[str, ...]]:
    """The numbers of one arm in the order of the headers, each followed by its small print."""
    runs = arm.get("runs") or []
    accuracies = numbers(run.get("final_accuracy") for run in runs)
    losses = numbers(run.get("final_loss") for run in runs)
    times = numbers(run.get("reference_s_to_target") for run in runs)
    cost = number(arm.get("step_cost_ms"))
    unit = number(section(section(results, "arms"), "uniform").get("step_cost_ms"))
    versus = section(section(results, "comparison"), name)
    ahead, ahead_low, ahead_high = (
        None if (share := number(versus.get(f"final_accuracy_{part}"))) is None else 100 * share
        for part in ("difference", "low", "high")
    )
    return [
        (_show(arm.get("steps"), "{:,.0f}"),),
        (_show(cost, "{:,.2f} ms"), _show(cost / unit if cost and unit else None, "{:.2f}× uniform")),
        (
            _show(_mean(accuracies), "{:.2%}"),
            _span(min(accuracies, default=None), max(accuracies, default=None), "{:.2%}"),
        ),
        (_show(ahead, "{:+.2f} points"), _span(ahead_low, ahead_high, "{:+.2f}")),
        (_show(_mean(losses), "{:.4f}"),),
        (_show(_mean(times), "{:,.1f} s"),),
        (_show(versus.get("speedup"), "{:.2f}×"), _span(versus.get("low"), versus.get("high"), "{:.2f}×")),
        (f"{len(times)} of {len(runs)}",),
    ]


def _levels(results: Results) -> str:
    """What the numbers of the table are to be held against."""
    target, unigram = section(results, "target"), section(results, "unigram")
    return (
        f'<p class="note">Target: {_show(target.get("accuracy"), "{:.2%}")} validation accuracy '
        f"({_text(target.get('source'))}); the time to it is reference time, mean over the seeds that got there. "
        f"A model that ignores context ends at {_show(unigram.get('accuracy'), '{:.2%}')} accuracy, "
        f"{_show(unigram.get('loss'), '{:.4f}')} loss. Small print: lowest and highest seed of the accuracy, "
        "intervals of the comparisons with uniform.</p>"
    )


def _figure(figure: Any, heading: str, caption: str) -> str:
    # Letters stay readable: a narrow screen scrolls inside the card, a wide one does not blow them up.
    width = f"min-width: {4 * figure.get_figwidth():g}rem; max-width: {5.8 * figure.get_figwidth():g}rem"
    return (
        f'<figure><div class="card plot" role="img" tabindex="0" aria-label="{heading}. {caption}">'
        f'<div style="{width}">{to_svg(figure)}</div></div><figcaption>{caption}</figcaption></figure>'
    )


def _method() -> str:
    terms = (f"<div><dt>{term}</dt><dd>{meaning}</dd></div>" for term, meaning in METHOD.items())
    return f"<dl>{''.join(terms)}</dl>"


def _operations_table(results: Results) -> str:
    rows = [
        [
            _text(name),
            *(_show(timing.get(key), "{:,.2f} ms") for key in ("median", "low", "high")),
            _show(timing.get("count"), "{:,.0f}×"),
        ]
        for name, timing in sections(results, "operations_ms").items()
    ]
    return "<h3>Time of each operation</h3>" + _table(
        "Time of each operation", "numbers operations", OPERATION_HEADERS, rows
    )


def _run_tables(results: Results) -> str:
    """What went in and what it ran on, one table each."""
    origin = {"commit": results.get("commit"), "created": results.get("created")}
    tables = {
        "Configuration": section(results, "config"),
        "Data": section(results, "data"),
        "Machine": section(results, "machine"),
        "Versions": {**section(results, "versions"), **origin},
    }
    filled = (
        f"<div><h3>{title}</h3>{_table(title, '', (), [map(_text, row) for row in rows.items()])}</div>"
        for title, rows in tables.items()
        if rows
    )
    return f'<div class="pairs">{"".join(filled)}</div>'


def _table(title: str, kind: str, headers: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table in a box of its own to scroll in; a row's first cell is its header. Cells are HTML already."""
    head = "".join(f'<th scope="col">{header}</th>' for header in headers)
    body = "".join(
        f'<tr><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in rest)}</tr>' for first, *rest in rows
    )
    return (
        f'<div class="card" role="region" tabindex="0" aria-label="{title}"><table class="{kind}">'
        f"{head and f'<thead><tr>{head}</tr></thead>'}<tbody>{body}</tbody></table></div>"
    )


def _cell(main: str, *small_print: str) -> str:
    return main + "".join(f"<small>{line}</small>" for line in small_print if line)


def _mean(values: list[float]) -> float | None:
    return fmean(values) if values else None


def _text(value: object) -> str:
    return MISSING if value is None else escape(str(value))


def _show(value: object, form: str) -> str:
    return MISSING if number(value) is None else form.format(value)


def _span(low: object, high: object, form: str) -> str:
    """An interval, or nothing when an end is missing: small print is no place for dashes."""
    return "" if number(low) is None or number(high) is None else f"{form.format(low)} … {form.format(high)}"

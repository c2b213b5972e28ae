"""Results of comparisons -> one self-contained HTML page: no script, no request.

The page answers in the order a reader asks: who won, by how much, how the runs went, where the time went, what was
decided, on what. Every string of the results is escaped where it enters the page.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from itertools import cycle
from pathlib import Path

from earlysift.files import write_whole
from earlysift.report.chart import Axis, Measure, Trace, explorer, switch_css
from earlysift.report.figures import COLUMNS, curves_figure, save_png
from earlysift.report.series import (
    LINES,
    SHOWN_AT_FIRST,
    Results,
    items,
    label,
    mean,
    number,
    plain,
    prominent,
    section,
    sections,
    seeds,
    styles,
)
from earlysift.report.shape import read_json, require_shape
from earlysift.report.tables import (
    decisions_table,
    operations_table,
    outcome,
    overview_table,
    pairs_table,
    spent_table,
    text,
    verdict_table,
    workload,
)

RESULTS = "results.json"
RESULTS_VERSION = 2
CSS = Path(__file__).with_name("page.css").read_text(encoding="utf-8")

CURVE_AXES = tuple(Axis(key, title, from_zero=True) for key, title in COLUMNS)
TIMES = tuple(axis for axis in CURVE_AXES if axis.key != "trained_samples")

# What the controller estimates (`earlysift.controller.estimates`): "payoff.greedy.1.0.5" and its like are the lines of
# "payoff", for the greedy rule at exit 1 and keep 0.5.
ESTIMATES = {
    "payoff": Measure("payoff", levels={"break-even": 1.0}),
    "payoff_C2": Measure("payoff by gain (C2)", levels={"break-even": 1.0}),
    "payoff_T7": Measure("payoff by variance (T7)", levels={"break-even": 1.0}),
    "gain": Measure("gain", levels={"random picks": 1.0}),
    "correlation": Measure("rank correlation", levels={"random picks": 0.0}),
    "noise_scale": Measure("gradient noise scale (samples)"),
}
CHOICE = re.compile(r"(?:(?P<rule>[a-z]+)\.)?(?P<exit>\d+)(?:\.(?P<keep>[\d.]+))?")
# The arms of which the headline of several runs speaks.
HEADLINE_ARMS = ("sift", "auto")

SEEDS_CAPTION = "Lines are means over seeds; bands span the lowest to the highest seed."
ARMS_CAPTION = """At first the main arms and the best of the others are shown. The first quarter of the curves may lie
outside the frame, so that their ends can be told apart."""
SPENT_CAPTION = """What the time of each arm was spent on, mean over seeds. Reading candidates, scoring them, probing
and training a reference model count as much as training itself."""
FIDELITY_CAPTION = """How closely the score ranks candidates as the exact loss does. A rank correlation of 1 means the
same order, an overlap of 1 the same kept samples. The gain is the mean exact loss of the kept samples over that of the
pool: at 1 they are no harder than the rest."""
CONTROL_CAPTION = """What the arm estimated while it trained. A payoff above 1 means that selection was predicted to be
worth its cost. Vertical lines mark the switches of all seeds."""
OVERVIEW_CAPTION = """Speed-up over uniform training in reference time with its 95 % interval, and the difference in
final accuracy; where there is no comparison, the final accuracy itself."""
NOTHING = "nothing measured yet"

# How results were measured that do not say so themselves (as "method", by the same terms).
METHOD = {
    "Reference time": "Every operation is timed in this run, and an arm is charged its number of operations "
    "times their median time. Noise of the machine therefore cannot favour an arm.",
    "Equal budgets": "Every arm starts from the same weights and may spend the same reference time, once per "
    "seed. An arm whose steps cost more takes fewer of them.",
    "Learning rate": "It decays fully within each arm's own budget, so no arm is judged in the middle of its schedule.",
    "Evaluation": "Accuracy and loss are measured on held-out data in its original distribution, never on "
    "selected samples.",
    "Costs": "Every cost of training is charged: reading candidates, scoring them and selecting count as much as "
    "the training step itself. Evaluations, and the fidelity measured at them, are the same for all arms and free. "
    "An arm marked as not charged is an upper bound, not a competitor.",
    "Speed-up": "Uniform's time to the target over this arm's, in reference time or wall time. Above 1× the arm was "
    "faster. Gain (▲): the whole 95 % interval over seeds lies above 1. Harm (▼): that of the final accuracy lies "
    "below uniform's. Not proved (?): too few seeds for an interval.",
}


def render(*runs: Results) -> str:
    """The whole page.

    Args:
        runs: what `results.json` holds, of one run or several; parts may be missing, their numbers are shown as a dash.

    Returns:
        HTML that loads nothing from anywhere; equal results give equal text.
    """
    several = len(runs) > 1
    title = _count(runs) if several else workload(runs[0])
    body = "\n".join(_run(results, f"run{i}", 2 if several else 1) for i, results in enumerate(runs))
    overview = f"""<header><p class="eyebrow">earlysift</p><h1>{_headline(runs)}</h1></header>
<section><h2>Overview</h2>{overview_table(runs)}
{_note(_overview_caption(runs))}</section>"""
    lines = max(explorer.count('type="checkbox"') for explorer in body.split('class="explorer"'))
    method = {term: meaning for results in runs for term, meaning in (section(results, "method") or METHOD).items()}
    terms = "".join(f"<div><dt>{text(term)}</dt><dd>{text(meaning)}</dd></div>" for term, meaning in method.items())
    content = f"""{overview if several else ""}
{body}
<section><h2>How it was measured</h2><dl>{terms}</dl></section>"""
    switches = switch_css(measures=len(ESTIMATES), axes=len(CURVE_AXES), lines=lines)
    return document(f"earlysift: {title}", content, switches)


def document(title: str, body: str, switches: str) -> str:
    """The frame of every page: one file that loads nothing from anywhere and runs nothing.

    Args:
        title: In HTML, for the window.
        body: What stands on the page, in HTML.
        switches: The rules of its explorers, from `earlysift.report.chart.switch_css`.
    """
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{CSS}
{switches}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""


def write_report(*run_folders: Path, out: Path | None = None) -> Path:
    """Read `results.json` of run folders and write one page; for a single run, its `curves.png` too.

    Args:
        run_folders: folders that `earlysift compare` or `earlysift pretrain` wrote, at least one.
        out: where to write the page; `report.html` in the run folder, or in the common parent of several, if None.

    Returns:
        The path of the page.

    Raises:
        FileNotFoundError: A folder holds no results.
        ValueError: The results are damaged, or of a version that this code does not know; or there is no folder.
    """
    if not run_folders:
        raise ValueError("expected at least one run folder, got none; give the folders that `earlysift compare` wrote")
    runs = [read_results(folder) for folder in run_folders]
    page = render(*runs).encode("utf-8")
    if len(runs) == 1:
        curves = curves_figure(runs[0])
        write_whole(run_folders[0] / "curves.png", lambda part: save_png(curves, part))
        home = run_folders[0]
    else:
        home = Path(os.path.commonpath([folder.resolve().parent for folder in run_folders]))
    out = out or home / "report.html"
    write_whole(out, lambda part: part.write_bytes(page))
    return out


def read_results(run_folder: Path) -> Results:
    """The content of `results.json`, checked for damage and version; raises what `write_report` does."""
    path = run_folder / RESULTS
    if not path.is_file():
        raise FileNotFoundError(
            f"expected the results of a comparison in {path}, found no such file; "
            "give the folder that `earlysift compare` wrote"
        )
    results = read_json(path)
    version = results.get("version") if isinstance(results, dict) else None
    if version != RESULTS_VERSION:
        raise ValueError(
            f"expected results of version {RESULTS_VERSION} in {path}, found version {version!r}; "
            "read them with the version of earlysift that wrote them, or repeat the comparison"
        )
    require_shape(results, path)
    return dict(results)


def _run(results: Results, anchor: str, level: int) -> str:
    """Everything about one run, its headings from this level down."""
    badge = '<p class="badge">Partial run: stopped early, numbers may change</p>'
    parts = [
        ("Arms", verdict_table(results), _levels(results)),
        ("Learning curves", _curves(results, anchor), _curves_caption(results)),
        ("Where the time went", spent_table(results), SPENT_CAPTION),
        ("Fidelity of the score", _fidelity(results, anchor), FIDELITY_CAPTION),
        *_decisions(results, anchor),
        ("The run", _run_tables(results, level + 2), ""),
    ]
    if not results.get("complete"):
        parts = [(heading, content or _note(NOTHING), caption * bool(content)) for heading, content, caption in parts]
    h, below = f"h{level}", f"h{level + 1}"
    body = "\n".join(
        f"<section><{below}>{heading}</{below}>{content}{_note(caption) if caption else ''}</section>"
        for heading, content, caption in parts
        if content
    )
    return f"""<article id="{anchor}">
<header>
<p class="eyebrow">earlysift · {workload(results)}</p>
<{h}>{text(results.get("verdict") or "No verdict yet")}</{h}>
{"" if results.get("complete") else badge}
<p class="facts">{_facts(results)}</p>
</header>
{body}
</article>"""


def _headline(runs: Iterable[Results]) -> str:
    """What several runs say about each of the main arms, in numbers of runs."""
    runs, said = list(runs), []
    for name in HEADLINE_ARMS:
        compared = [results for results in runs if section(section(results, "comparison"), name)]
        words = [outcome(section(section(results, "comparison"), name)).word for results in compared]
        counts = ", ".join(f"{word} on {words.count(word)}" for word in dict.fromkeys(words))
        if compared:
            title = label(name, section(section(compared[0], "arms"), name))
            said.append(f"{text(title)}: {counts} of {len(words)} comparison{'s' * (len(words) > 1)}")
    return "; ".join(said) or _count(runs)


def _count(runs: Sequence[Results]) -> str:
    return f"{len(runs)} {'comparisons' if _compared(runs) else 'runs'}"


def _overview_caption(runs: Iterable[Results]) -> str:
    entries = [entry for results in runs for entry in sections(results, "comparison").values() if entry]
    if not entries:
        return "Final accuracy of each arm, mean over seeds."
    symbols = dict.fromkeys(f"{symbol} {word}" for word, symbol, _ in map(outcome, entries))
    return f"{OVERVIEW_CAPTION} {', '.join(symbols)}."


def _compared(runs: Iterable[Results]) -> bool:
    return any(section(results, "comparison") for results in runs)


def _facts(results: Results) -> str:
    """One line under the headline: how much was run, where and when. What is not known is left out."""
    arms = sections(results, "arms").values()
    facts = (
        ("seeds per arm: {}", max((len(seeds(arm)) for arm in arms), default=0)),
        ("{:,g} s of reference time for each", number(section(results, "config").get("budget"))),
        ("{}", section(results, "machine").get("cpu")),
        ("{}", results.get("created")),
    )
    return " · ".join(text(form.format(value)) for form, value in facts if value)


def _levels(results: Results) -> str:
    """What the numbers of the table are to be held against; what is not known is left out."""
    target, baseline = section(results, "target"), section(results, "baseline")
    compared = _compared([results])
    words = []
    if (accuracy := number(target.get("accuracy"))) is not None:
        words += [f"Target: {accuracy:.2%} validation accuracy ({text(target.get('source'))})."]
        words += ["Times to it are reference time, averaged over the seeds that reached it."] * compared
    ends = [("{:.2%} accuracy", number(baseline.get("accuracy"))), ("{:.4f} loss", number(baseline.get("loss")))]
    known = [form.format(end) for form, end in ends if end is not None]
    words += [f"A model that ignores its input reaches {' and '.join(known)}."] * bool(known)
    if any(len(seeds(arm)) > 1 for arm in sections(results, "arms").values()):
        intervals = ", and 95 % intervals of the comparisons with uniform" * compared
        words += [f"Small print: lowest and highest seed of accuracy and loss{intervals}."]
    return " ".join(words)


def _arm_traces(results: Results, keys: tuple[str, ...]) -> list[Trace]:
    arms, shown = sections(results, "arms"), prominent(results)
    look = styles(arms)
    return [Trace(label(name, arm), look[name], seeds(arm), keys, name in shown) for name, arm in arms.items()]


def _curves(results: Results, anchor: str) -> str:
    target, baseline = section(results, "target"), section(results, "baseline")
    measures = [
        Measure(
            f"validation {key}",
            is_share=key == "accuracy",
            levels={"target": target.get(key), "ignoring the input": baseline.get(key)},
            whole=len(section(results, "arms")) == 1,
        )
        for key in ("accuracy", "loss")
    ]
    return explorer(f"{anchor}-curves", "curve", measures, CURVE_AXES, _arm_traces(results, ("accuracy", "loss")))


def _curves_caption(results: Results) -> str:
    arms = sections(results, "arms").values()
    several = any(len(seeds(arm)) > 1 for arm in arms)
    return " ".join([SEEDS_CAPTION] * several + [ARMS_CAPTION] * (len(arms) > 1))


def _fidelity(results: Results, anchor: str) -> str:
    # Random picks: uncorrelated with the loss, share `keep` of the exact picks, and lose what the pool loses.
    measures = (
        Measure("rank correlation", levels={"random picks": 0.0}),
        Measure("overlap", levels={"random picks": section(results, "config").get("keep")}),
        Measure("gain", levels={"random picks": 1.0}),
    )
    traces = _arm_traces(results, ("rank_correlation", "overlap", "gain"))
    return explorer(f"{anchor}-fidelity", "fidelity", measures, TIMES, traces)


def _decisions(results: Results, anchor: str) -> list[tuple[str, str, str]]:
    """Heading and content for each arm that wrote down what it estimated or decided."""
    return [
        (f"What {text(label(name, arm))} saw and decided", _control(arm, f"{anchor}-control{i}"), "")
        for i, (name, arm) in enumerate(sections(results, "arms").items())
        if any(run.get("control") or run.get("events") for run in seeds(arm))
    ]


def _control(arm: Results, name: str) -> str:
    runs = seeds(arm)
    points = [point for run in runs for point in items(run, "control")]
    traces = []
    for estimate in ESTIMATES:
        keys = dict.fromkeys(key for point in points for key in point if key.partition(".")[0] == estimate)
        highest = sorted(keys, key=lambda key: -(mean(point.get(key) for point in points) or 0))
        for key, style in zip(keys, cycle(LINES), strict=False):
            keys_of_measures = tuple(key if each == estimate else None for each in ESTIMATES)
            shown = key in highest[:SHOWN_AT_FIRST]
            traces.append(Trace(_choice(key.partition(".")[2]), style, runs, keys_of_measures, shown))
    events = [event for run in runs for event in items(run, "events")]
    chart = explorer(name, "control", tuple(ESTIMATES.values()), TIMES, traces, events)
    return chart + _note(CONTROL_CAPTION) * bool(chart) + decisions_table(arm)


def _choice(name: str) -> str:
    """The controller's name of a choice in words: "greedy.1.0.5" is "greedy, exit 1, keep 0.5"."""
    found = CHOICE.fullmatch(name)
    if not found:
        return plain(name)[:40] or "estimate"
    words = (found["rule"], f"exit {found['exit']}", found["keep"] and f"keep {found['keep']}")
    return ", ".join(word for word in words if word)


def _run_tables(results: Results, level: int) -> str:
    """What went in, what it ran on, and the times it was charged by."""
    origin = {"commit": results.get("commit"), "created": results.get("created")}
    tables = {
        "Configuration": section(results, "config"),
        "Data": section(results, "data"),
        "Machine": section(results, "machine"),
        "Versions": {**section(results, "versions"), **origin},
    }
    filled = (
        f"<div><h{level}>{title}</h{level}>{pairs_table(title, rows)}</div>" for title, rows in tables.items() if rows
    )
    times = (
        ("Time of each operation, charged", "operations_ms"),
        ("Time of each operation within the arms' own steps", "measured_ms"),
    )
    details = (
        f"<details><summary>{title}</summary>{operations_table(results, part)}</details>"
        for title, part in times
        if section(results, part)
    )
    return f'<div class="pairs">{"".join(filled)}</div>{"".join(details)}'


def _note(words: str) -> str:
    return f'<p class="note">{words}</p>'

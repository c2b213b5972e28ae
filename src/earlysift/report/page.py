"""From the results of comparisons to one self-contained HTML page without scripts or requests.

The page answers in the order of a reader's questions: which arm won and by how much, how the runs went, where the time
went, what was decided, and on which machine. Every string of the results is escaped where it is inserted.
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
    budget,
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

# Estimates of the controller (`earlysift.payoffs.estimates`). Keys such as "payoff.greedy.1.0.5", for the greedy
# rule at exit 1 and keep 0.5, are the lines of "payoff".
ESTIMATES = {
    "payoff": Measure("payoff", levels={"break-even": 1.0}),
    "payoff_C2": Measure("payoff by gain (C2)", levels={"break-even": 1.0}),
    "payoff_T7": Measure("payoff by variance (T7)", levels={"break-even": 1.0}),
    "gain": Measure("gain", levels={"random picks": 1.0}),
    "correlation": Measure("rank correlation", levels={"random picks": 0.0}),
    "noise_scale": Measure("gradient noise scale (samples)"),
}
CHOICE = re.compile(r"(?:(?P<rule>[a-z]+)\.)?(?P<exit>\d+)(?:\.(?P<keep>[\d.]+))?")
# The arms in the headline of several runs.
HEADLINE_ARMS = ("sift", "auto")

SEEDS_CAPTION = "Lines are means over seeds; bands span the lowest to the highest seed."
ARMS_CAPTION = """At first the main arms and the best of the others are shown. The first quarter of the curves may lie
outside the frame, so that their ends can be distinguished."""
SPENT_CAPTION = """How each arm spent its time, mean over seeds. Reading candidates, scoring them, probing and training
a reference model are charged in the same way as training."""
FIDELITY_CAPTION = """How similarly the score and the exact loss rank candidates. A rank correlation of 1 means the
same order, an overlap of 1 the same kept samples. The gain is the mean exact loss of the kept samples over that of the
pool: at 1 they are no harder than the rest."""
CONTROL_CAPTION = """Estimates of the arm while it trained. A payoff above 1 means that selection was predicted to be
worth its cost. Vertical lines mark the switches of all seeds."""
OVERVIEW_CAPTION = """Speed-up over uniform training in reference time with its 95 % interval, and the difference in
final accuracy; without a comparison, the final accuracy itself."""
NOTHING = "nothing measured yet"

# The method of results that have no "method" of their own; by the same terms.
METHOD = {
    "Reference time": "Every operation is timed in this run, and an arm is charged its number of operations "
    "times their median time. Noise on the machine therefore cannot favour an arm.",
    "Equal budgets": "Every arm starts from the same weights and may spend the same reference time, once per "
    "seed. An arm with more expensive steps takes fewer of them.",
    "Learning rate": "It decays fully within each arm's own budget, so no arm is judged in the middle of its schedule.",
    "Evaluation": "Accuracy and loss are measured on held-out data in its original distribution, never on "
    "selected samples.",
    "Costs": "Every cost of training is charged: reading, scoring and selecting candidates as well as the training "
    "step itself. Evaluations, with their measurement of fidelity, are the same for all arms and free. "
    "An arm marked as not charged is an upper bound, not a competitor.",
    "Speed-up": "Uniform's time to the target over this arm's, in reference time or wall time. Above 1× the arm was "
    "faster. Gain (▲): the whole 95 % interval over seeds is above 1. Harm (▼): the whole interval of the final "
    "accuracy is below uniform's. Not proved (?): too few seeds for an interval.",
}


def render(*runs: Results) -> str:
    """The whole page.

    Args:
        runs: The content of `results.json` of one or more runs; missing numbers are shown as a dash.

    Returns:
        HTML that loads nothing; equal results give equal text.
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
    """The document of every page: one file that loads nothing and runs no script.

    Args:
        title: Title of the window, in HTML.
        body: Content of the page, in HTML.
        switches: Rules of its explorers, from `earlysift.report.chart.switch_css`.
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
    """Read `results.json` of run folders and write one page; for a single run, also its `curves.png`.

    Args:
        run_folders: Folders that `earlysift compare` or `earlysift pretrain` wrote, at least one.
        out: Where to write the page; None: `report.html` in the run folder, or in the common parent of several.

    Returns:
        The path of the page.

    Raises:
        FileNotFoundError: If a folder has no results.
        ValueError: If results are damaged or of an unknown version, or no folder is given.
    """
    if not run_folders:
        raise ValueError("Expected at least one run folder, got none. Give the folders that `earlysift compare` wrote.")
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
    """The validated content of `results.json`; raises as `write_report` does."""
    path = run_folder / RESULTS
    if not path.is_file():
        raise FileNotFoundError(
            f"Expected the results of a comparison in {path}, found no such file. "
            "Give the folder that `earlysift compare` wrote."
        )
    results = read_json(path)
    version = results.get("version") if isinstance(results, dict) else None
    if version != RESULTS_VERSION:
        raise ValueError(
            f"Expected results of version {RESULTS_VERSION} in {path}, found version {version!r}. "
            "Read them with the version of earlysift that wrote them, or repeat the comparison."
        )
    require_shape(results, path)
    return dict(results)


def _run(results: Results, anchor: str, level: int) -> str:
    """The article about one run; its headings start at this level."""
    badge = '<p class="badge">Partial run: not everything has finished, numbers may change</p>'
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
    heading_tag, subheading_tag = f"h{level}", f"h{level + 1}"
    body = "\n".join(
        f"<section><{subheading_tag}>{heading}</{subheading_tag}>{content}{_note(caption) if caption else ''}</section>"
        for heading, content, caption in parts
        if content
    )
    return f"""<article id="{anchor}">
<header>
<p class="eyebrow">earlysift · {workload(results)}</p>
<{heading_tag}>{text(results.get("verdict") or "No verdict yet")}</{heading_tag}>
{"" if results.get("complete") else badge}
<p class="facts">{_facts(results)}</p>
</header>
{body}
</article>"""


def _headline(runs: Iterable[Results]) -> str:
    """The number of runs by outcome, for each of the main arms."""
    runs, parts = list(runs), []
    for name in HEADLINE_ARMS:
        compared = [results for results in runs if section(section(results, "comparison"), name)]
        words = [outcome(section(section(results, "comparison"), name)).word for results in compared]
        counts = ", ".join(f"{word} on {words.count(word)}" for word in dict.fromkeys(words))
        if compared:
            title = label(name, section(section(compared[0], "arms"), name))
            parts.append(f"{text(title)}: {counts} of {len(words)} comparison{'s' * (len(words) > 1)}")
    return "; ".join(parts) or _count(runs)


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
    """The line under the headline: how much was run, where and when; unknown facts are omitted."""
    arms = sections(results, "arms").values()
    facts = (
        ("seeds per arm: {}", max((len(seeds(arm)) for arm in arms), default=0)),
        ("{} for each", budget(section(results, "config"))),
        ("{}", section(results, "machine").get("cpu")),
        ("{}", results.get("created")),
    )
    return " · ".join(text(form.format(value)) for form, value in facts if value)


def _levels(results: Results) -> str:
    """Reference values for the numbers of the table; unknown ones are omitted."""
    target, baseline = section(results, "target"), section(results, "baseline")
    compared = _compared([results])
    sentences = []
    if (accuracy := number(target.get("accuracy"))) is not None:
        sentences += [f"Target: {accuracy:.2%} validation accuracy ({text(target.get('source'))})."]
        sentences += ["Times to it are reference time, averaged over the seeds that reached it."] * compared
    ends = [("{:.2%} accuracy", number(baseline.get("accuracy"))), ("{:.4f} loss", number(baseline.get("loss")))]
    known = [form.format(end) for form, end in ends if end is not None]
    sentences += [f"A model that ignores its input reaches {' and '.join(known)}."] * bool(known)
    if any(len(seeds(arm)) > 1 for arm in sections(results, "arms").values()):
        intervals = ", and 95 % intervals of the comparisons with uniform" * compared
        sentences += [f"Small print: lowest and highest seed of accuracy and loss{intervals}."]
    return " ".join(sentences)


def _arm_traces(results: Results, keys: tuple[str, ...]) -> list[Trace]:
    arms, shown = sections(results, "arms"), prominent(results)
    arm_styles = styles(arms)
    return [Trace(label(name, arm), arm_styles[name], seeds(arm), keys, name in shown) for name, arm in arms.items()]


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
    # Random picks are uncorrelated with the loss, overlap the exact picks by `keep`, and have the pool's mean loss.
    measures = (
        Measure("rank correlation", levels={"random picks": 0.0}),
        Measure("overlap", levels={"random picks": section(results, "config").get("keep")}),
        Measure("gain", levels={"random picks": 1.0}),
    )
    traces = _arm_traces(results, ("rank_correlation", "overlap", "gain"))
    return explorer(f"{anchor}-fidelity", "fidelity", measures, TIMES, traces)


def _decisions(results: Results, anchor: str) -> list[tuple[str, str, str]]:
    """Heading, content and caption for each arm with estimates or decisions."""
    return [
        (f"Estimates and decisions of {text(label(name, arm))}", _control(arm, f"{anchor}-control{i}"), "")
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
            keys_of_measures = tuple(key if measure == estimate else None for measure in ESTIMATES)
            shown = key in highest[:SHOWN_AT_FIRST]
            traces.append(Trace(_choice(key.partition(".")[2]), style, runs, keys_of_measures, shown))
    events = [event for run in runs for event in items(run, "events")]
    chart = explorer(name, "control", tuple(ESTIMATES.values()), TIMES, traces, events)
    return chart + _note(CONTROL_CAPTION) * bool(chart) + decisions_table(arm)


def _choice(name: str) -> str:
    """A choice of the controller in words: "greedy.1.0.5" is "greedy, exit 1, keep 0.5"."""
    match = CHOICE.fullmatch(name)
    if not match:
        return plain(name)[:40] or "estimate"
    words = (match["rule"], f"exit {match['exit']}", match["keep"] and f"keep {match['keep']}")
    return ", ".join(word for word in words if word)


def _run_tables(results: Results, level: int) -> str:
    """Configuration, data, machine and versions of a run, and the times of its operations."""
    origin = {"commit": results.get("commit"), "created": results.get("created")}
    tables = {
        "Configuration": section(results, "config"),
        "Data": section(results, "data"),
        "Machine": section(results, "machine"),
        "Versions": {**section(results, "versions"), **origin},
    }
    facts = (
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
    return f'<div class="pairs">{"".join(facts)}</div>{"".join(details)}'


def _note(words: str) -> str:
    return f'<p class="note">{words}</p>'

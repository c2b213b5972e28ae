"""Write docs/results.md from the committed results: ``python benchmarks/results_page.py`` (or ``make docs``).

Every number of the page comes from a file under benchmarks/results: ``compare_*.json`` (the results.json of a run of
``earlysift compare``), and those of ``benchmarks/run.py``; each names hardware and commit.
The measured part of docs/theory.md comes from ``theory.json``, which ``earlysift theory`` writes, and the tables of
docs/reliability.md from ``reliability.json`` and ``fuzz.json``, which ``benchmarks/reliability.py`` and
``benchmarks/fuzz.py`` write.
"""

import json
import statistics
import sys
from pathlib import Path
from typing import Any

from earlysift.compare.settings import Settings
from earlysift.compare.verdict import judged
from earlysift.controller import ENOUGH
from earlysift.report.page import RESULTS_VERSION
from earlysift.theory.findings import show_cell
from pictures import THEMES, verdict_picture
from sections import benchmark_sections
from targets import targets_section

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
README_RESULTS = "compare_cpu_mnist-epochs.json"
_README_ARMS = ("uniform", "sift-2", "probe-2-unbiased", "memory", "auto")
_NOT_IN_README = ("steps", "final loss", "time to target", "speed-up by wall time")
_README_START, _README_END = "<!-- verdicts -->", "<!-- /verdicts -->"
_THEORY_START, _THEORY_END = "<!-- theory -->", "<!-- /theory -->"
_SCORES_START, _SCORES_END = "<!-- scorecard -->", "<!-- /scorecard -->"
_FUZZ_START, _FUZZ_END = "<!-- fuzz -->", "<!-- /fuzz -->"
_SHORT = 20  # rows of a table of docs/theory.md; longer ones stand on the page of `earlysift theory` alone
_MAIN_ARMS = ("auto", "sift")  # which have columns of their own in the overview
_KINDS = ("read", "score", "probe", "lesson", "train", "reference model")
_SCORING = ("score", "select", "exit", "gather")  # parts of what a sifter's call takes, where that was not timed
_MOST_EVENTS = 4  # decisions shown per seed

_INTRODUCTION = """# Results

Written by `make docs` from the files in [benchmarks/results](../benchmarks/results); edit those, not this page.
Reference time charges every operation at its median measured in the same run: in the arms' own steps, or, in results
that show no calibrated times beside the charged ones, in a calibration before the run, which charged scoring too much.
Selective backprop drew by percentiles within the pool in those. Every arm starts from the same weights,
reads the same stream, spends the same budget, and its learning rate decays to zero at the end of it. Accuracy is on
held-out data in its own distribution: of masked or next tokens, of sentences, of images. A speed-up is uniform's time
to the target over the arm's, a geometric mean over seeds; in brackets 95 % intervals of comparisons by Student's t
(for ratios on their logarithms), and the smallest and largest seed of everything else. Verdicts are made from the runs
when this page is written. "Never acted": every step of the arm was uniform training's own, on every seed. "Could not
decide": auto had fewer probes than it needs to switch on. Runs of auto are by the
controller of their commit: on workloads of several epochs (`…-epochs`, `mnist-flipped-20`) by the present one or one
that differs as the log says, elsewhere by earlier ones, which decide by other conditions. Wall time tells little
here: runs were made at different
hours, on cores that did other work beside; auto, which takes uniform's very steps, shows how little. In masked language
modelling a tenth of the labelled tokens stays visible and is predicted by copying; "on hidden tokens" are the points
from uniform on the others, and the arm "visible labels" is a control without a model that prefers candidates with many
visible ones.
"""


def main() -> int:
    """Write the page, the generated parts of other documents, and the picture of the README."""
    readme_pictures(ROOT / "docs")
    for path, start, end, section in (
        (ROOT / "README.md", _README_START, _README_END, readme_section),
        (ROOT / "docs" / "theory.md", _THEORY_START, _THEORY_END, theory_section),
        (ROOT / "docs" / "reliability.md", _SCORES_START, _SCORES_END, scorecard_section),
        (ROOT / "docs" / "reliability.md", _FUZZ_START, _FUZZ_END, fuzz_section),
    ):
        if path.is_file():
            before, _, rest = path.read_text(encoding="utf-8").partition(start)
            _, _, after = rest.partition(end)
            path.write_text(f"{before}{start}\n{section()}\n{end}{after}", encoding="utf-8")
    comparisons = [(path, results) for path in sorted(RESULTS.glob("compare_*.json")) if (results := _read(path))]
    parts = [_INTRODUCTION]
    if comparisons:
        parts += [_overview([results for _, results in comparisons])]
    parts += [_comparison(path, results) for path, results in comparisons]
    parts += [targets_section(RESULTS), *benchmark_sections(RESULTS, ROOT / "docs")]
    (ROOT / "docs" / "results.md").write_text("\n".join(parts), encoding="utf-8")
    return 0


def theory_section() -> str:
    """What `earlysift theory` measured, as Markdown: the sentence of each experiment, and its short tables."""
    results = json.loads((RESULTS / "theory.json").read_text(encoding="utf-8"))
    parts = [f"Command: `earlysift theory --seed {results['seed']} --results benchmarks/results --out runs/theory`."]
    for finding in results["findings"].values():
        parts.append(f"### {finding['title']}\n\n{finding['summary']}")
        for title, table in finding["tables"].items():
            if len(table["rows"]) <= _SHORT:
                rows = [[show_cell(cell) for cell in row] for row in table["rows"]]
                parts.append(f"{title}:\n\n{_table(table['headers'], rows)}")
    return "\n\n".join(parts)


def scorecard_section() -> str:
    """Lines of the scorecard, as Markdown: what passed of how many cases."""
    from reliability import LINES

    lines = json.loads((RESULTS / "reliability.json").read_text(encoding="utf-8"))
    rows = []
    for name, line in LINES.items():
        if (result := lines.get(name)) is None:
            rows.append([name, line.what, f"{line.cases:,}", "not run", "", "", ""])
            continue
        word = "" if result["passed"] == line.cases else " **missed**"
        passed = f"{result['passed']:,}{word}"
        cells = [result["what"], f"{line.cases:,}", passed, "; ".join(result["detail"]), f"{result['seconds']} s"]
        rows.append([name, *cells, str(result["commit"])])
    measured = list(lines.values())[-1]
    versions = ", ".join(f"{name} {version}" for name, version in measured["versions"].items())
    machine = f"{measured['machine']['cpu']}, {measured['machine']['cores']} cores; {versions}."
    headings = ["line", "what holds", "bar (cases)", "passed", "measured", "took", "commit"]
    return f"{_table(headings, rows)}\n\n{machine}"


def fuzz_section() -> str:
    """What each kind of bad input led to, as Markdown."""
    fuzz = json.loads((RESULTS / "fuzz.json").read_text(encoding="utf-8"))
    outcomes = list(next(iter(fuzz["counts"].values())))
    rows = [[kind, *(f"{count:,}" for count in counts.values())] for kind, counts in fuzz["counts"].items()]
    return f"{_table(['what', *outcomes], rows)}\n\nSeed {fuzz['seed']}; {fuzz['hardware']}; commit {fuzz['commit']}."


def verdict_table(results: dict[str, Any], short: bool = False) -> str:
    """Arms of one comparison as a Markdown table; ``short`` keeps the arms and columns that the README shows."""
    rows = []
    hides = any("final_hidden_accuracy" in run for arm in results["arms"].values() for run in arm["runs"])
    for name in _readme_arms(results) if short else results["arms"]:
        arm = results["arms"][name]
        runs = [run for run in arm["runs"] if run["finished"]]
        entry = results["comparison"].get(name, {})
        mark = "" if arm["charged"] else " (not charged)"
        uniform = name == "uniform"
        row = {
            "arm": arm["label"] + mark,
            "steps": _spread([run["steps"] for run in runs], "{:.0f}"),
            "final accuracy": f"{_spread([100 * run['final_accuracy'] for run in runs], '{:.2f}')} %",
            "points from uniform": "0"
            if uniform
            else _interval(entry, "final_accuracy_", "difference", "{:+.2f}", 100),
            "on hidden tokens": _interval(entry, "final_hidden_accuracy_", "difference", "{:+.2f}", 100),
            "final loss": _spread([run["final_loss"] for run in runs if run["final_loss"] is not None], "{:.3f}"),
            "time to target": _to_target(runs),
            "speed-up": "1" if uniform else _interval(entry, "", "speedup", "{:.2f}"),
            "speed-up by wall time": "1" if uniform else _interval(entry, "wall_", "speedup", "{:.2f}"),
            "verdict": "" if uniform else _word(entry),
        }
        left_out = (() if hides else ("on hidden tokens",)) + (_NOT_IN_README if short else ())
        rows.append({heading: cell for heading, cell in row.items() if heading not in left_out})
    return _table(list(rows[0]), [list(row.values()) for row in rows])


def spent_table(results: dict[str, Any]) -> str:
    """Where each arm's reference time went, in per cent."""
    rows = []
    for arm in results["arms"].values():
        spent_s = {kind: sum(run["spent_s"].get(kind, 0.0) for run in arm["runs"]) for kind in _KINDS}
        total_s = sum(spent_s.values())
        rows.append([arm["label"], *(f"{100 * s / total_s:.1f}" if total_s else "–" for s in spent_s.values())])
    return _table(["% of reference time", *_KINDS], rows)


def charges_table(results: dict[str, Any]) -> str:
    """What a step of each arm was charged, beside what it took in the arm's own steps; empty if no arm scores.

    Charged is reference time over steps, whatever rule it was charged by. "Its own" are the medians in the arm's own
    steps: of the sifter's whole call, or the sum of its parts in results that do not have it. Machines are busier at
    times, so the ratios are what to compare.
    """
    rows = []
    for name, arm in results["arms"].items():
        own_ms = {
            part: timing["median"]
            for part in ("sift", *_SCORING, "train")
            if (timing := results["measured_ms"].get(f"{name}: {part}"))
        }
        scored = results["measured_ms"].get(f"{name}: score", {}).get("count")
        spent_ms = {kind: 1e3 * sum(run["spent_s"].get(kind, 0.0) for run in arm["runs"]) for kind in _KINDS}
        if not scored or not spent_ms["score"] or "train" not in own_ms:
            continue
        charged_ms = spent_ms["score"] / scored, spent_ms["train"] / sum(run["steps"] for run in arm["runs"])
        scoring_ms = own_ms.get("sift") or sum(own_ms.get(part, 0.0) for part in _SCORING)
        took_ms = scoring_ms, own_ms["train"]
        charged, took = charged_ms[0] / charged_ms[1], took_ms[0] / took_ms[1]
        times = [f"{ms:.1f}" for pair in zip(charged_ms, took_ms, strict=True) for ms in pair]
        excess = round(100 * (charged / took - 1))
        rows.append([arm["label"], *times, f"{charged:.3f}", f"{took:.3f}", f"{excess:+d} %"])
    if not rows:
        return ""
    headings = ["what a step costs", "scoring charged, ms", "its own, ms", "training charged, ms", "its own, ms"]
    headings += ["scoring of training, charged", "its own", "charged over own"]
    return f"\n{_table(headings, rows)}\n"


def decisions(results: dict[str, Any]) -> str:
    """What auto decided, seed by seed."""
    lines = []
    for run in results["arms"]["auto"]["runs"]:
        still = "uniform throughout" + f", as a decision needs {ENOUGH} looks" * (len(run["control"]) < ENOUGH)
        events = run["events"]
        changes = [
            f"at {event['reference_s']:.1f} s (step {event['step']}) from {event['from']} to {event['to']}: "
            f"{event['reason']}"
            for event in events[:_MOST_EVENTS]
        ]
        if len(events) > _MOST_EVENTS:
            changes.append(f"and {len(events) - _MOST_EVENTS} more")
        count = len(run["control"])
        share = run["spent_s"]["probe"] / sum(run["spent_s"].values())
        looks = f"{count} look{'s' * (count != 1)}, {100 * share:.1f} % of the time for probes"
        lines.append(f"  - seed {run['seed']} ({looks}): {'; '.join(changes) or still}")
    return "\n".join(lines)


def fidelity_line(results: dict[str, Any]) -> str:
    """Rank correlation and gain of the exit in the SIFT arm, from the first evaluation to the last."""
    runs = results["arms"]["sift"]["runs"]
    parts = []
    for name, label in (("rank_correlation", "rank correlation"), ("overlap", "overlap"), ("gain", "gain")):
        series = [[point[name] for point in run["fidelity"]] for run in runs]
        means = [statistics.fmean(values) for values in zip(*series, strict=True)]
        middle = means[len(means) // 2]
        parts.append(
            f"{label} {means[0]:.3f} at the start, {middle:.3f} half-way, {means[-1]:.3f} at the end "
            f"(lowest {min(means):.3f})"
        )
    return "; ".join(parts)


def readme_section() -> str:
    """Verdicts of the workload that the README shows, and what they were measured on."""
    results = _read(RESULTS / README_RESULTS)
    if results is None:
        return "There is no committed result of this version yet."
    machine, versions, reached = results["machine"], results["versions"], results["baseline"]["accuracy"]
    return f"""{verdict_table(results, short=True)}

{results["config"]["seeds"]} seeds. In brackets: lowest and highest seed of an accuracy, 95 % interval of a comparison.
A model that ignores its input reaches {100 * reached:.2f} %. {machine["cpu"]}, {machine["cores"]} cores;
torch {versions["torch"]}, transformers {versions["transformers"]}; commit {results["commit"]}."""


def readme_pictures(folder: Path) -> None:
    """Draw the README's picture of that workload, one for each colour scheme."""
    if results := _read(RESULTS / README_RESULTS):
        for theme in THEMES:
            verdict_picture(results, _readme_arms(results), theme, folder / f"verdict-{theme}.svg")


def _readme_arms(results: dict[str, Any]) -> list[str]:
    return [name for name in _README_ARMS if name in results["arms"]]


def _read(path: Path) -> dict[str, Any] | None:
    """Results of this version, judged by the present rules; None for others, which wait to be measured again."""
    results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return results | judged(results) if results["version"] == RESULTS_VERSION else None


def _overview(comparisons: list[dict[str, Any]]) -> str:
    rows = []
    for results in comparisons:
        entries = {name: entry for name, entry in results["comparison"].items() if results["arms"][name]["charged"]}
        peers = {
            name: entry["speedup"]
            for name, entry in entries.items()
            if entry["speedup"] and not entry["withheld"] and name not in _MAIN_ARMS
        }
        best = max(peers, key=lambda name: peers[name], default=None)
        rows.append(
            [
                f"{results['data']['name']}, {results['config']['budget']:g} s",
                str(results["config"]["seeds"]),
                *(f"{_interval(entry, '', 'speedup', '{:.2f}')} {_word(entry)}" for entry in _two(entries)),
                "–"
                if best is None
                else f"{results['arms'][best]['label']}: "
                f"{_interval(entries[best], '', 'speedup', '{:.2f}')} {_word(entries[best])}",
            ]
        )
    headings = ["workload", "seeds", "auto", "SIFT", "fastest other arm to reach the target on every seed"]
    return f"\nSpeed-up over uniform training in reference time:\n\n{_table(headings, rows)}\n"


def _two(entries: dict[str, Any]) -> list[dict[str, Any]]:
    return [entries.get(name, {}) for name in _MAIN_ARMS]


def _comparison(path: Path, results: dict[str, Any]) -> str:
    operations = results["operations_ms"]
    step_ms = operations["train"]["median"]
    before = results.get("calibrated_ms", {})  # where prices have followed the steps since
    calibrated = {name: f"; calibrated {timing['median']:.1f} ms" for name, timing in before.items()}
    costs = ", ".join(
        f"{name} {entry['median']:.1f} ms ({entry['median'] / step_ms:.3f}{calibrated.get(name, '')})"
        for name, entry in operations.items()
    )
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    facts = ", ".join(f"{name} {value}" for name, value in results["data"].items() if name not in ("name", "task"))
    machine, baseline, target, arms = (results[name] for name in ("machine", "baseline", "target", "arms"))
    device = f"{machine['accelerator']}, " if machine.get("accelerator") else ""
    optional = [f"- Decisions of auto:\n{decisions(results)}"] if "auto" in arms else []
    if "sift" in arms:
        depth = results["config"]["depth"]
        optional += [f"- Exit {depth} against exact loss, SIFT arm, on the validation set: {fidelity_line(results)}."]
    return f"""
## {results["data"]["name"]}, {results["config"]["budget"]:g} s

**{results["verdict"]}**

{verdict_table(results)}

Seeds: {results["config"]["seeds"]}. Target: {100 * target["accuracy"]:.2f} % ({target["source"]}). A model that ignores
its input reaches {100 * baseline["accuracy"]:.2f} % accuracy and a loss of {baseline["loss"]:.3f}.

{spent_table(results)}
{charges_table(results)}
- Command: `{_command(results)}` ([{path.name}](../benchmarks/results/{path.name}))
- Data: {facts}.
- Cost of the operations, as charged (and of a training step): {costs}.
{chr(10).join(optional)}
- Machine: {device}{machine["cpu"]}, {machine["cores"]} cores, {machine["threads"]} thread(s), {machine["memory_gib"]}
  GiB. {versions}; commit {results["commit"]}.
"""


def _command(results: dict[str, Any]) -> str:
    """The command of a comparison: the settings that differ from the defaults."""
    defaults = Settings().identity()
    flags = []
    for name, value in results["config"].items():
        if value != defaults.get(name):
            values = value if isinstance(value, list) else [value]
            words = [] if value is True else values
            flags.append(" ".join([f"--{name.replace('_', '-')}", *map(str, words)]))
    return " ".join([f"OMP_NUM_THREADS={results['machine']['threads']} earlysift compare", *flags])


def _table(headings: list[str], rows: list[list[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _spread(values: list[float], form: str) -> str:
    if not values:
        return "–"
    low, mean, high = (form.format(v) for v in (min(values), statistics.fmean(values), max(values)))
    return mean if low == high else f"{mean} ({low} to {high})"


def _interval(entry: dict[str, Any], prefix: str, name: str, form: str, scale: float = 1.0) -> str:
    middle, low, high = (entry.get(f"{prefix}{part}") for part in (name, "low", "high"))
    if middle is None:
        return "–"
    ends = "" if low is None or high is None else f" ({form.format(scale * low)} to {form.format(scale * high)})"
    return form.format(scale * middle) + ends


def _word(entry: dict[str, Any]) -> str:
    return str(entry.get("verdict", "")).partition(":")[0]


def _to_target(runs: list[dict[str, Any]]) -> str:
    times = [run["reference_s_to_target"] for run in runs if run["reference_s_to_target"] is not None]
    mean = f"{statistics.fmean(times):.0f} s" if times else "never"
    return mean if len(times) in (len(runs), 0) else f"{mean} ({len(times)} of {len(runs)} seeds)"


if __name__ == "__main__":
    sys.exit(main())

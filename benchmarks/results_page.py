"""Write docs/results.md from the committed results: ``python benchmarks/results_page.py`` (or ``make docs``).

Every number of the page comes from a file under benchmarks/results: ``compare_*.json`` (the results.json of a run of
``earlysift compare``), and those of ``benchmarks/run.py``; each names hardware and commit.
The measured part of docs/theory.md comes from ``theory.json``, which ``earlysift theory`` writes, and the tables of
docs/reliability.md from ``reliability.json`` and ``fuzz.json``, which ``benchmarks/reliability.py`` and
``benchmarks/fuzz.py`` write.
"""

import json
import sys
from pathlib import Path
from typing import Any

from arm_tables import verdict_table
from comparisons import comparison_parts
from earlysift.theory.findings import show_cell
from measuring import markdown
from pictures import THEMES, verdict_picture
from sections import benchmark_sections
from targets import targets_section
from workloads import read, read_all, seed_count

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
README_RESULTS = "compare_cpu_mnist-epochs.json"
_README_ARMS = ("uniform", "sift-2", "probe-2-unbiased", "memory", "auto")
_README_START, _README_END = "<!-- verdicts -->", "<!-- /verdicts -->"
_THEORY_START, _THEORY_END = "<!-- theory -->", "<!-- /theory -->"
_SCORES_START, _SCORES_END = "<!-- scorecard -->", "<!-- /scorecard -->"
_FUZZ_START, _FUZZ_END = "<!-- fuzz -->", "<!-- /fuzz -->"
_SHORT = 20  # rows of a table of docs/theory.md; longer ones stand on the page of `earlysift theory` alone


def main() -> int:
    """Write the page, the generated parts of other documents, and the pictures."""
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
    parts = ["# Results\n", *comparison_parts(read_all(RESULTS), ROOT / "docs")]
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
                parts.append(f"{title}:\n\n{markdown(table['headers'], rows)}")
    return "\n\n".join(parts)


def scorecard_section() -> str:
    """Lines of the scorecard, as Markdown: what passed of how many cases."""
    from reliability import ELSEWHERE, LINES, NOT_RUN

    lines = json.loads((RESULTS / "reliability.json").read_text(encoding="utf-8"))
    rows, endured = [], _endured()
    for name in sorted([*LINES, *ELSEWHERE, *NOT_RUN], key=_place):
        if name in ELSEWHERE:
            what, where = ELSEWHERE[name]
            rows.append([name, what, "", "elsewhere", endured.get(name, "") + where, "", ""])
        elif name in NOT_RUN:
            rows.append([name, "", "", "not run", NOT_RUN[name], "", ""])
        elif (result := lines.get(name)) is None:
            rows.append([name, LINES[name].what, f"{LINES[name].cases:,}", "not run", "its cases are there", "", ""])
        else:
            passed = _passed(result)
            detail = "; ".join(result["detail"])
            cells = [result["what"], f"{result['cases']:,}", passed, detail, f"{result['seconds']} s"]
            rows.append([name, *cells, str(result["commit"])])
    measured = list(lines.values())[-1]
    versions = ", ".join(f"{name} {version}" for name, version in measured["versions"].items())
    machine = f"{measured['machine']['cpu']}, {measured['machine']['cores']} cores; {versions}."
    headings = ["line", "what holds", "bar (cases)", "passed", "measured, or why not", "took", "commit"]
    return f"{markdown(headings, rows)}\n\n{machine}"


def _endured() -> dict[str, str]:
    """Lines of the scorecard that the benchmark of endurance measures, and what it found."""
    entries = json.loads((RESULTS / "endurance_cpu.json").read_text(encoding="utf-8"))["entries"]
    (long,), (killed,) = entries["many steps"]["long"], entries["killed"]["killed"]
    equal = "bit-equal" if killed["equal"] else "**not equal**"
    return {
        "S19": f"{killed['kills']} kills, {killed['lost_s']:.1f} s lost by each (median), "
        f"{killed['effective_hour']:.1%} effective at 20 an hour, {equal}: ",
        "S23": f"memory {long['growth']:+.1%}, time of a step {long['late_ms'] / long['early_ms'] - 1:+.1%}: ",
    }


def _passed(result: dict[str, Any]) -> str:
    """How many cases passed; a line that was cut before it had tried all says so."""
    if result["passed"] >= result["cases"]:
        return f"{result['passed']:,}"
    if result["passed"] == result.get("tried"):
        return f"{result['passed']:,} of {result['tried']:,} tried"
    return f"{result['passed']:,} **missed**"


def _place(name: str) -> tuple[bool, int, str]:
    """Where a line stands: by its number, others (A1) last."""
    number = name.partition(" ")[0][1:].rstrip(",")
    return not name.startswith("S"), int(number) if number.isdecimal() else 0, name


def fuzz_section() -> str:
    """What each kind of bad input led to, as Markdown."""
    fuzz = json.loads((RESULTS / "fuzz.json").read_text(encoding="utf-8"))
    outcomes = list(next(iter(fuzz["counts"].values())))
    rows = [[kind, *(f"{count:,}" for count in counts.values())] for kind, counts in fuzz["counts"].items()]
    return f"{markdown(['what', *outcomes], rows)}\n\nSeed {fuzz['seed']}; {fuzz['hardware']}; commit {fuzz['commit']}."


def readme_section() -> str:
    """Verdicts of the workload that the README shows, and what they were measured on."""
    results = read(RESULTS / README_RESULTS)
    if results is None:
        return "There is no committed result of this version yet."
    machine, versions, reached = results["machine"], results["versions"], results["baseline"]["accuracy"]
    return f"""{verdict_table(results, arms=_readme_arms(results))}

{seed_count(results)} seeds. In brackets: lowest and highest seed of an accuracy, 95 % interval of a comparison.
A model that ignores its input reaches {100 * reached:.2f} %. {machine["cpu"]}, {machine["cores"]} cores;
torch {versions["torch"]}, transformers {versions["transformers"]}; commit {results["commit"]}."""


def readme_pictures(folder: Path) -> None:
    """Draw the README's picture of that workload, one for each colour scheme."""
    if results := read(RESULTS / README_RESULTS):
        for theme in THEMES:
            verdict_picture(results, _readme_arms(results), theme, folder / f"verdict-{theme}.svg")


def _readme_arms(results: dict[str, Any]) -> list[str]:
    return [name for name in _README_ARMS if name in results["arms"]]


if __name__ == "__main__":
    sys.exit(main())

"""Write docs/results.md from the committed results: ``python benchmarks/results_page.py`` (or ``make docs``).

Every number of the page comes from a file under benchmarks/results: ``compare_*.json`` (the results.json of a run of
``earlysift compare``) and ``score_*.json`` (from ``benchmarks/run.py score``); each names hardware and commit.
"""

import json
import statistics
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
_DEMO_START, _DEMO_END = "<!-- demo -->", "<!-- /demo -->"

_INTRODUCTION = """# Results

Written by `make docs` from the files in [benchmarks/results](../benchmarks/results); edit those, not this page.
Reference time charges every operation at its median measured in the same run. Every arm starts from the same weights,
reads the same stream, spends the same budget, and its learning rate decays to zero at the end of it. Accuracy is
masked-token accuracy on held-out text under one fixed uniform mask.
"""


def main() -> int:
    """Write the page, and the demo's result into the README."""
    readme = ROOT / "README.md"
    if readme.is_file():
        before, _, rest = readme.read_text(encoding="utf-8").partition(_DEMO_START)
        _, _, after = rest.partition(_DEMO_END)
        readme.write_text(f"{before}{_DEMO_START}\n{demo_section()}\n{_DEMO_END}{after}", encoding="utf-8")
    parts = [_INTRODUCTION]
    parts += [_comparison(path) for path in sorted(RESULTS.glob("compare_*.json"))]
    parts += [_scoring(path) for path in sorted(RESULTS.glob("score_*.json"))]
    (ROOT / "docs" / "results.md").write_text("\n".join(parts), encoding="utf-8")
    return 0


def comparison_table(results: dict[str, Any]) -> str:
    """Arms of one comparison as a Markdown table (the README uses it, too)."""
    lines = [
        "| arm | steps | ms per step (reference) | final accuracy | final loss | time to target | speed-up |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, arm in results["arms"].items():
        runs = [run for run in arm["runs"] if run["finished"]]
        entry = results["comparison"].get(name, {})
        lines.append(
            f"| {arm['label']} | {arm['steps']} | {arm['step_cost_ms']:.1f} | "
            f"{_spread([100 * run['final_accuracy'] for run in runs], '{:.2f}')} % | "
            f"{_spread([run['final_loss'] for run in runs], '{:.3f}')} | "
            f"{_to_target(runs)} | {_speedup(name, entry)} |"
        )
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


def demo_section() -> str:
    """Table and verdict of the committed ``make demo`` result, for the README."""
    results = json.loads((RESULTS / "compare_demo.json").read_text(encoding="utf-8"))
    machine, versions = results["machine"], results["versions"]
    return f"""> {results["verdict"]}

{comparison_table(results)}

{machine["cpu"]}, {machine["cores"]} cores; torch {versions["torch"]}, transformers {versions["transformers"]}; commit
{results["commit"]}. A model that ignores context reaches {100 * results["unigram"]["accuracy"]:.2f} %."""


def _comparison(path: Path) -> str:
    results = json.loads(path.read_text(encoding="utf-8"))
    operations = results["operations_ms"]
    step_ms = operations["train"]["median"]
    costs = ", ".join(
        f"{name} {entry['median']:.1f} ms ({entry['median'] / step_ms:.3f} of a training step)"
        for name, entry in operations.items()
    )
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    machine = results["machine"]
    unigram = results["unigram"]
    return f"""
## {results["data"]["name"]}

**{results["verdict"]}**

{comparison_table(results)}

Seeds: {results["config"]["seeds"]}; means, smallest to largest in brackets. A model that ignores context reaches
{100 * unigram["accuracy"]:.2f} % accuracy and a loss of {unigram["loss"]:.3f}.

- Command: `{_command(results)}` ([{path.name}](../benchmarks/results/{path.name}))
- Data: {results["data"]["train_blocks"]} training and {results["data"]["validation_blocks"]} validation blocks of
  {results["data"]["length"]} tokens, vocabulary {results["data"]["vocab_size"]}.
- Cost of the operations: {costs}.
- {_measured(results)}
- Exit {results["config"]["depth"]} against exact loss, SIFT arm, on the validation set: {fidelity_line(results)}.
- Machine: {machine["cpu"]}, {machine["cores"]} cores, {machine["threads"]} thread(s), {machine["memory_gib"]} GiB.
  {versions}; commit {results["commit"]}.
"""


def _scoring(path: Path) -> str:
    from run import table

    result = json.loads(path.read_text(encoding="utf-8"))
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return f"""
## Cost of scoring, BERT base shape

Scoring a pool of 2b beside a training step of b (labelled-tokens-only head, bf16 autocast), interleaved in one run.
"Predicted" is the ratio of FLOPs (C1). Command: `make bench` ([{path.name}](../benchmarks/results/{path.name})).
{table(result)}

{result["hardware"]}, {result["threads"]} threads; {versions}; commit {result["commit"]}.
"""


def _measured(results: dict[str, Any]) -> str:
    score_ms, train_ms = (results["measured_ms"][f"sift: {name}"]["median"] for name in ("score", "train"))
    return (
        f"Beside the calibration, medians of SIFT's own steps: score {score_ms:.1f} ms, train {train_ms:.1f} ms "
        f"(ratio {score_ms / train_ms:.3f})."
    )


def _command(results: dict[str, Any]) -> str:
    config = results["config"]
    data = "" if config["data"] is None else f" --data {config['data']}"
    threads = f"OMP_NUM_THREADS={results['machine']['threads']} "
    return f"{threads}earlysift compare --seeds {config['seeds']} --budget {config['budget']:g}{data}"


def _spread(values: list[float], form: str) -> str:
    low, mean, high = (form.format(v) for v in (min(values), statistics.fmean(values), max(values)))
    return mean if len(values) == 1 else f"{mean} ({low}-{high})"


def _to_target(runs: list[dict[str, Any]]) -> str:
    times = [run["reference_s_to_target"] for run in runs if run["reference_s_to_target"] is not None]
    mean = f"{statistics.fmean(times):.0f} s" if times else "never"
    return mean if len(times) in (len(runs), 0) else f"{mean} ({len(times)} of {len(runs)} seeds)"


def _speedup(name: str, entry: dict[str, Any]) -> str:
    if name == "uniform":
        return "1"
    if entry.get("speedup") is None:
        return "–"
    interval = "" if entry["low"] is None else f" ({entry['low']:.2f}-{entry['high']:.2f})"
    return f"{entry['speedup']:.2f}{interval}"


if __name__ == "__main__":
    sys.exit(main())

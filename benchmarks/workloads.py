"""The comparisons of docs/results.md: read, judged by the present rules, named, and sorted by what they can tell."""

import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from earlysift.compare.verdict import judged
from earlysift.report.page import RESULTS_VERSION
from earlysift.report.series import seeds
from earlysift.report.tables import GAIN, HARM, NEVER_ACTED, Outcome, outcome

Results = dict[str, Any]
CONTROLS = ("visible",)  # arms that test an explanation; nobody would train with them
EASIER_SHARE = 0.95  # of uniform's final accuracy: the second target of every workload
LEAST_ODDS = 2.0  # uniform's odds of a right answer over the baseline's, from which it has learnt enough to compare
FEWEST_SEEDS = 3  # that give an interval
_DATA = {
    "clinc150": "CLINC150",
    "sst2": "SST-2 sentiment",
    "mnist.npz": "MNIST",
    "handwritten digits": "Handwritten digits",
    "wikitext-2": "WikiText-2",
    "wikipedia-en + books-litbank": "Wikipedia and books",
    "redundant-text": "Redundant text",
}  # other data keep their names
_PYTHON = "Python code"  # its standard library, whatever the version
_MODELS = {
    "masked_lm": "BERT",
    "classification": "BERT",
    "causal_lm": "Llama",
    "image": "ViT",
    "masked_characters": "ModernBERT",
}
_PREDICTED = {"masked_lm": " masked tokens", "causal_lm": " next tokens", "masked_characters": " masked characters"}
_ALTERED = {"flipped": "{:.0%} of labels flipped", "repeated": "{:.0%} copies", "augmented": "augmented"}
_TELLING = ("keep", "learning_rate", "budget", "steps")  # settings that tell workloads of one name apart, in this order


class Workload(NamedTuple):
    """One comparison.

    Attributes:
        name: What was trained on what for how long, in words; no other workload has it.
        file: The name of its file.
        results: Content of that results.json, judged.
        easier: Every arm against uniform by the time to `EASIER_SHARE`; empty where that is the target anyway.
    """

    name: str
    file: str
    results: Results
    easier: Results


class Row(NamedTuple):
    """An arm in the picture; an arm that missed the target on a seed has no speed-up, but a note."""

    label: str
    outcome: Outcome
    speedup: float | None
    low: float | None
    high: float | None
    note: str


def seed_count(results: Results) -> int:
    """Seeds that uniform training finished; a run that was cut was to have more."""
    return len(seeds(results["arms"]["uniform"]))


def read(path: Path) -> Results | None:
    """Results of this version, judged by the present rules; None for others, which wait to be measured again."""
    results: Results = json.loads(path.read_text(encoding="utf-8"))
    return results | judged(results) if results["version"] == RESULTS_VERSION else None


def read_all(folder: Path) -> list[Workload]:
    """Every comparison in a folder of results; those with the largest proven speed-ups come first."""
    found = [(path.name, results) for path in sorted(folder.glob("compare_*.json")) if (results := read(path))]
    names = spelled([results for _, results in found])
    workloads = [
        Workload(name, file, results, against_easier_target(results))
        for name, (file, results) in zip(names, found, strict=True)
    ]
    return sorted(workloads, key=lambda workload: -proven_speedup(workload.results))


def against_easier_target(results: Results) -> Results:
    """The comparison by the time to `EASIER_SHARE` of uniform's final accuracy; empty if that is the target already."""
    config = results["config"]
    if not config["target"] and config["target_share"] == EASIER_SHARE:
        return {}
    # Judging writes the times to the target into the runs, so it gets runs of its own.
    arms = {name: {**arm, "runs": [dict(run) for run in arm["runs"]]} for name, arm in results["arms"].items()}
    easier = {**config, "target": None, "target_share": EASIER_SHARE}
    comparison: Results = judged({**results, "arms": arms, "config": easier})["comparison"]
    return comparison


def spelled(every: list[Results]) -> list[str]:
    """A name for each of several results; settings, and at last commits, are added to names that would be the same."""
    names = list(map(_plain_name, every))
    for setting in _TELLING:
        values = [results["config"].get(setting) for results in every]
        among: dict[str, set[Any]] = {}
        for name, value in zip(names, values, strict=True):
            among.setdefault(name, set()).add(value)
        names = [
            f"{name}, {setting.replace('_', ' ')} {value:g}" if len(among[name]) > 1 and value is not None else name
            for name, value in zip(names, values, strict=True)
        ]
    return [
        f"{name}, commit {results['commit']}" if names.count(name) > 1 else name
        for name, results in zip(names, every, strict=True)
    ]


def longest_s(results: Results) -> float:
    """Reference time that the longest run took; all have the same budget."""
    runs = [run for arm in results["arms"] for run in _finished(results, arm)]
    return max((run["curve"][-1]["reference_s"] for run in runs), default=0)


def uniform_accuracy(results: Results) -> tuple[float, bool]:
    """What uniform training ends with, and whether that is on hidden tokens alone.

    It is where that was measured, since visible tokens are copied from the input without leaving the plateau.
    """
    runs = _finished(results, "uniform")
    hidden = bool(runs) and all(run.get("final_hidden_accuracy") is not None for run in runs)
    return statistics.fmean(
        [run["final_hidden_accuracy" if hidden else "final_accuracy"] for run in runs] or [0]
    ), hidden


def leaves_plateau(results: Results) -> bool:
    """Whether uniform training learnt enough for a comparison: `LEAST_ODDS` times the odds of a constant answer.

    Odds (right over wrong answers) allow one rule for two classes and for a thousand.
    """
    (reached, _), constant = uniform_accuracy(results), results["baseline"]["accuracy"]
    return bool(reached * (1 - constant) >= LEAST_ODDS * constant * (1 - reached))


def pictured(workload: Workload) -> bool:
    """Whether the picture shows a workload: uniform training leaves its plateau, and there are seeds enough."""
    return len(_finished(workload.results, "uniform")) >= FEWEST_SEEDS and leaves_plateau(workload.results)


def competitors(results: Results) -> dict[str, Results]:
    """The entries of arms that one could train with: all costs charged, no control, and they acted."""
    return {
        name: entry
        for name, entry in results["comparison"].items()
        if results["arms"][name]["charged"] and name not in CONTROLS and not entry["withheld"]
    }


def proven_speedup(results: Results) -> float:
    """The largest speed-up among competitors whose verdict is a gain; 0 if there is none."""
    return max((entry["speedup"] for entry in competitors(results).values() if outcome(entry) is GAIN), default=0.0)


def rows(results: Results) -> list[Row]:
    """The arms of a workload in the picture, fastest first, then those that missed the target on a seed.

    Arms that are not charged are no methods, and arms that never acted are uniform training; both are in the tables.
    """
    made = []
    for name, entry in results["comparison"].items():
        arm = results["arms"][name]
        if arm["charged"] and entry["withheld"] != NEVER_ACTED.word:
            label = arm["label"] + " (control)" * (name in CONTROLS)
            numbers = (entry["speedup"], entry["low"], entry["high"])
            made.append((entry, Row(label, outcome(entry), *numbers, "" if entry["speedup"] else missed(entry))))
    made.sort(key=lambda pair: (-(pair[0]["speedup"] or 0), -pair[0]["reached"], -_final(pair[0])))
    return [row for _, row in made]


def missed(entry: Results) -> str:
    """How an arm failed that did not reach the target on every seed: by how much it is worse, or on how many seeds."""
    if outcome(entry) is HARM:
        points = 100 * _final(entry)
        return f"{points:.{1 if points <= -0.05 else 2}f} points".replace("-", "\N{MINUS SIGN}")
    return f"{entry['reached']} of {entry['seeds']} seeds arrived"


def counted(every: Iterable[Results], verdict: Outcome) -> int:
    """How many workloads have a competitor with this verdict."""
    return sum(any(outcome(entry) is verdict for entry in competitors(results).values()) for results in every)


def _finished(results: Results, arm: str) -> list[Results]:
    return [run for run in results["arms"].get(arm, {}).get("runs", []) if run["finished"]]


def _final(entry: Results) -> float:
    return float(entry["final_accuracy_difference"] or 0.0)


def _plain_name(results: Results) -> str:
    data, config = results["data"], results["config"]
    told, task = data["name"].partition(",")[0], data["task"]
    name = _PYTHON if told.startswith("Python ") else _DATA.get(told, told)
    altered = ", ".join(form.format(data[key]) for key, form in _ALTERED.items() if data.get(key))
    by_architecture = {"modernbert": "ModernBERT"}.get(config.get("architecture", ""), _MODELS[task])
    model = "pre-trained encoder," if data.get("checkpoint") else by_architecture
    length = _length(results)
    return f"{name}{_PREDICTED.get(task, '')}{altered and f' ({altered})'}, {model} {config['layers']} layers, {length}"


def _length(results: Results) -> str:
    """How long uniform training was: in epochs, or in steps where it saw no more than half of the data."""
    steps = statistics.fmean([run["steps"] for run in _finished(results, "uniform")] or [0])
    epochs = steps * results["config"]["batch"] / results["data"]["train_samples"]
    return f"{epochs:.2g} epochs" if epochs > 0.5 else f"{steps:.0f} steps"

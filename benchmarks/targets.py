"""What was aimed at in speed, as rows of data, and what the committed results reached."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import measuring

Entry = dict[str, Any]


class Target(NamedTuple):
    """One aim.

    Attributes:
        what: What is measured.
        benchmark: Whose results hold it.
        shapes: How the names of its entries begin.
        value: Reads it off an entry; None if an older entry lacks it.
        bound: What it is to reach.
        most: Whether the bound is from above.
    """

    what: str
    benchmark: str
    shapes: str
    value: Callable[[Entry], float | None]
    bound: float
    most: bool = True


def _score(key: str, operation: str = "score, depth 1") -> Callable[[Entry], float | None]:
    return lambda entry: next((float(row[key]) for row in entry["rows"] if row["operation"] == operation), None)


def _learning(key: str) -> Callable[[Entry], float | None]:
    """The largest of a number among the scores that learn."""

    def value(entry: Entry) -> float | None:
        return max((float(row[key]) for row in entry["rows"] if row.get("score", "loss") != "loss"), default=None)

    return value


def _only(key: str) -> Callable[[Entry], float]:
    return lambda entry: float(entry["rows"][0][key])


def _processes(told: str, base: str) -> Callable[[Entry], float]:
    def value(entry: Entry) -> float:
        overhead = {row["value"]: row["overhead"] for row in entry["rows"] if row["varied"] == "processes"}
        return float(overhead[told] / overhead[base])

    return value


def _dense_head_ratio(entry: Entry) -> float:
    ms = {row["operation"]: float(row["median_ms"]) for row in entry["rows"]}
    return ms["score, depth 1, dense head"] / ms["score, depth 1"]


def _worst_error(entry: Entry) -> float:
    return max(abs(float(row["error_percent"])) for row in entry["rows"])


TARGETS = (
    Target("scoring 2b at depth 1 over its roof", "score", "bert-base", _score("to_roof"), 1.15),
    Target("scoring 2b at depth 1, of a step of b", "score", "bert-base", _score("to_step"), 0.05),
    Target("exact loss with a dense head over it", "score", "bert-base", _score("dense_exact_ratio"), 6, most=False),
    Target("exit with a dense head over it", "score", "bert-base", _dense_head_ratio, 2, most=False),
    Target("the model's own step over ours", "step", "bert-base", _only("stock_ratio"), 1.15, most=False),
    Target("peak memory over the plain step's, pools up to 8b", "memory", "", _only("ratio"), 1.02),
    Target("the same with score probe, memory and blend", "memory", "", _learning("ratio"), 1.02),
    Target("recalling and remembering losses, of a step", "score", "", _score("to_step", "score, memory"), 0.005),
    Target("blend above its exit, of a step", "score", "", _score("above_exit", "score, depth 1, blend"), 0.01),
    Target("training a probe over scoring by it", "score", "", _score("training", "score, depth 1, probe"), 0.1),
    Target("selecting, of a step", "select", "", _only("to_step"), 0.005),
    Target("overhead on 2 processes over that on 1", "scale", "", _processes("2, local", "1"), 1.0),
    Target("global scope over local", "scale", "", _processes("2, global", "2, local"), 1.02),
    Target("largest error of foretold overhead, %", "scale", "", _worst_error, 15),
)


def targets_section(results: Path) -> str:
    """A table of targets and of what was reached, entry by entry."""
    lines = []
    for target in TARGETS:
        sign = "at most" if target.most else "at least"
        for path in sorted(results.glob(f"{target.benchmark}_*.json")):
            entries: dict[str, Entry] = json.loads(path.read_text(encoding="utf-8"))["entries"]
            values = {name: target.value(entry) for name, entry in entries.items() if name.startswith(target.shapes)}
            reached = {name: value for name, value in values.items() if value is not None}
            if not reached:
                continue
            met = [value <= target.bound if target.most else value >= target.bound for value in reached.values()]
            told = "; ".join(f"{name}: {value:.3g}" for name, value in reached.items())
            lines.append(
                [
                    target.what,
                    path.stem.rpartition("_")[2],
                    f"{sign} {target.bound:g}",
                    f"{sum(met)} of {len(met)}",
                    told,
                ]
            )
    table = measuring.markdown(["what", "device", "target", "met by", "reached"], lines)
    return f"## Targets of speed\n\nFrom the tables below; what each number is, they say.\n\n{table}\n"

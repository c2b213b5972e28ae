"""Tables of one comparison in docs/results.md: what its arms reached, what they were charged, what auto decided."""

import statistics
from collections.abc import Iterable

from earlysift.controller import ENOUGH
from measuring import markdown
from workloads import EASIER_SHARE, Results

_KINDS = ("read", "score", "probe", "lesson", "train", "reference model")
_SCORING = ("score", "select", "exit", "gather")  # parts of what a sifter's call takes, where that was not timed
_MOST_EVENTS = 4  # decisions shown per seed


def verdict_table(results: Results, easier: Results | None = None, arms: Iterable[str] = ()) -> str:
    """Arms of one comparison with their verdicts, as Markdown.

    Args:
        results: Of the comparison, judged.
        easier: The comparison by the time to `EASIER_SHARE`, for a column of its own.
        arms: Which arms, in this order; all if there are none.
    """
    lines = []
    hides = any("final_hidden_accuracy" in run for arm in results["arms"].values() for run in arm["runs"])
    own = _speedup_heading(results) if easier else "speed-up"
    for name in arms or results["arms"]:
        arm, entry = results["arms"][name], results["comparison"].get(name, {})
        accuracies = [100 * run["final_accuracy"] for run in _finished(arm)]
        uniform = name == "uniform"
        row = {
            "arm": _label(arm),
            "final accuracy": f"{_spread(accuracies, '{:.2f}')} %",
            "points from uniform": "0" if uniform else interval(entry, "final_accuracy_", "difference", "{:+.2f}", 100),
        }
        if hides:
            row["on hidden tokens"] = interval(entry, "final_hidden_accuracy_", "difference", "{:+.2f}", 100)
        row[own] = "1" if uniform else interval(entry, "", "speedup", "{:.2f}")
        if easier:
            to_easier = interval(easier.get(name, {}), "", "speedup", "{:.2f}")
            row[f"to {EASIER_SHARE:.0%}"] = "1" if uniform else to_easier
        row["verdict"] = "" if uniform else word(entry)
        lines.append(row)
    return markdown(list(lines[0]), [list(line.values()) for line in lines])


def course_table(results: Results) -> str:
    """What the main table leaves out: steps, final loss, time to the target and speed-up by wall time."""
    lines = []
    for name, arm in results["arms"].items():
        runs = _finished(arm)
        wall = interval(results["comparison"].get(name, {}), "wall_", "speedup", "{:.2f}")
        losses = [run["final_loss"] for run in runs if run["final_loss"] is not None]
        cells = [_spread([run["steps"] for run in runs], "{:.0f}"), _spread(losses, "{:.3f}"), _to_target(runs)]
        lines.append([_label(arm), *cells, "1" if name == "uniform" else wall])
    return markdown(["arm", "steps", "final loss", "time to target", "speed-up by wall time"], lines)


def spent_table(results: Results) -> str:
    """Where each arm's reference time went, in per cent."""
    lines = []
    for arm in results["arms"].values():
        spent_s = {kind: sum(run["spent_s"].get(kind, 0.0) for run in arm["runs"]) for kind in _KINDS}
        total_s = sum(spent_s.values())
        lines.append([arm["label"], *(f"{100 * s / total_s:.1f}" if total_s else "–" for s in spent_s.values())])
    return markdown(["% of reference time", *_KINDS], lines)


def charges_table(results: Results) -> str:
    """What a step of each arm was charged, beside what it took in the arm's own steps; empty if no arm scores.

    Charged is reference time over steps, whatever rule it was charged by. "Its own" are the medians in the arm's own
    steps: of the sifter's whole call, or the sum of its parts in results that do not have it. Machines are busier at
    times, so the ratios are what to compare.
    """
    lines = []
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
        lines.append([arm["label"], *times, f"{charged:.3f}", f"{took:.3f}", f"{excess:+d} %"])
    if not lines:
        return ""
    headings = ["what a step costs", "scoring charged, ms", "its own, ms", "training charged, ms", "its own, ms"]
    headings += ["scoring of training, charged", "its own", "charged over own"]
    return f"\n{markdown(headings, lines)}\n"


def decisions(results: Results) -> str:
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
        lines.append(f"- seed {run['seed']} ({looks}): {'; '.join(changes) or still}")
    return "\n".join(lines)


def fidelity_line(results: Results) -> str:
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


def interval(entry: Results, prefix: str, name: str, form: str, scale: float = 1.0) -> str:
    """A number of an entry of the comparison with its interval, if it has one."""
    middle, low, high = (entry.get(f"{prefix}{part}") for part in (name, "low", "high"))
    if middle is None:
        return "–"
    ends = "" if low is None or high is None else f" ({form.format(scale * low)} to {form.format(scale * high)})"
    return form.format(scale * middle) + ends


def word(entry: Results) -> str:
    """The verdict on an arm without its reasons."""
    return str(entry.get("verdict", "")).partition(":")[0]


def _speedup_heading(results: Results) -> str:
    config, target = results["config"], results["target"]
    goal = f"{target['accuracy']:.1%} accuracy" if config["target"] else f"{config['target_share']:.0%}"
    return f"speed-up to {goal}"


def _label(arm: Results) -> str:
    return f"{arm['label']}{'' if arm['charged'] else ' (not charged)'}"


def _finished(arm: Results) -> list[Results]:
    return [run for run in arm["runs"] if run["finished"]]


def _spread(values: list[float], form: str) -> str:
    if not values:
        return "–"
    low, mean, high = (form.format(v) for v in (min(values), statistics.fmean(values), max(values)))
    return mean if low == high else f"{mean} ({low} to {high})"


def _to_target(runs: list[Results]) -> str:
    times = [run["reference_s_to_target"] for run in runs if run["reference_s_to_target"] is not None]
    mean = f"{statistics.fmean(times):.0f} s" if times else "never"
    return mean if len(times) in (len(runs), 0) else f"{mean} ({len(times)} of {len(runs)} seeds)"

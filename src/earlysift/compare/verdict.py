"""Time to target, paired comparison with uniform, and the one sentence that says whether it paid."""

import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch

_RESAMPLES = 10_000
_SHORTEST_S = 1e-3  # a target that the untrained model meets takes no time, which has no ratio
Run = dict[str, Any]


def time_to_target(curve: Sequence[dict[str, float]], target: float, axis: str = "reference_s") -> float | None:
    """Where the rising fit of a curve reaches an accuracy, interpolated between evaluations; None if it never does.

    The first crossing of a noisy curve is luck, and early more often than late; `rising` takes the noise out.

    Example:
        >>> curve = [{"reference_s": 0.0, "accuracy": 0.0}, {"reference_s": 10.0, "accuracy": 0.2}]
        >>> time_to_target(curve, 0.1), time_to_target(curve, 0.3)
        (5.0, None)
    """
    fitted = rising([point["accuracy"] for point in curve])
    reached = next((i for i, accuracy in enumerate(fitted) if accuracy >= target), None)
    if not reached:
        return None if reached is None else curve[0][axis]
    (low, high), (before, after) = fitted[reached - 1 : reached + 1], curve[reached - 1 : reached + 1]
    return before[axis] + (target - low) / (high - low) * (after[axis] - before[axis])


def rising(values: Sequence[float]) -> list[float]:
    """The nearest sequence (least squares) that never falls: isotonic regression by pooling neighbours.

    Example:
        >>> rising([1.0, 3.0, 2.0, 4.0])
        [1.0, 2.5, 2.5, 4.0]
    """
    pools: list[list[float]] = []
    for value in values:
        pool = [value]
        while pools and statistics.fmean(pools[-1]) >= statistics.fmean(pool):
            pool = pools.pop() + pool
        pools.append(pool)
    return [statistics.fmean(pool) for pool in pools for _ in pool]


def paired_interval(values: Sequence[float], mean: Callable[[Sequence[float]], float]) -> tuple[float, float] | None:
    """95 % bootstrap interval of a mean over seeds; None for fewer than three.

    All resamples are enumerated for up to five seeds, 10,000 drawn with a fixed seed for more.

    Example:
        >>> paired_interval([1.0, 1.0, 1.0], statistics.fmean)
        (1.0, 1.0)
    """
    count = len(values)
    if count < 3:
        return None
    if count <= 5:
        means = [mean(sample) for sample in itertools.product(values, repeat=count)]
    else:
        picks = torch.randint(count, (_RESAMPLES, count), generator=torch.Generator().manual_seed(0)).tolist()
        means = [mean([values[i] for i in pick]) for pick in picks]
    cuts = statistics.quantiles(means, n=40, method="inclusive")
    return cuts[0], cuts[-1]


def compare_arms(arms: dict[str, Any], fixed_target: float | None, target_share: float) -> dict[str, Any]:
    """Target per seed, time to it in every run (written into the runs), and each arm against uniform, seed by seed.

    Args:
        arms: The ``arms`` part of results.json with finished runs only; every run gains its times to target.
        fixed_target: Target accuracy; None takes a share of what uniform reaches at the end of its budget on the same
            seed (of its rising fit, which one lucky evaluation does not move).
        target_share: That share.

    Returns:
        ``target`` and ``comparison`` of results.json. A speed-up (uniform's time to target over the arm's, geometric
        mean over seeds) is given only if every seed reached the target.
    """
    uniform = {run["seed"]: run for run in arms.get("uniform", {}).get("runs", [])}
    targets = {
        seed: fixed_target or target_share * rising([point["accuracy"] for point in run["curve"]])[-1]
        for seed, run in uniform.items()
    }
    for arm in arms.values():
        for run in arm["runs"]:
            target = targets.get(run["seed"])
            for axis in ("reference_s", "wall_s"):
                reached = None if target is None else time_to_target(run["curve"], target, axis)
                run[f"{axis}_to_target"] = reached
    if not targets:
        return {"target": None, "comparison": {}}
    source = "given" if fixed_target else f"{target_share:.0%} of uniform's final accuracy, seed by seed"
    target_entry: dict[str, Any] = {"accuracy": statistics.fmean(targets.values()), "source": source}
    comparison = {}
    for name, arm in arms.items():
        runs = [run for run in arm["runs"] if run["seed"] in uniform]
        if name != "uniform" and runs:
            entry = _against_uniform(runs, [uniform[run["seed"]] for run in runs])
            comparison[name] = {**entry, "verdict": verdict(arm, entry, target_entry["accuracy"])}
    return {"target": target_entry, "comparison": comparison}


def _against_uniform(runs: list[Run], uniform: list[Run]) -> dict[str, Any]:
    pairs = list(zip(runs, uniform, strict=True))
    reached = [None not in (run["reference_s_to_target"], other["reference_s_to_target"]) for run, other in pairs]
    entry: dict[str, Any] = {"seeds": len(pairs), "reached": sum(reached)}
    for axis, prefix in (("reference_s", ""), ("wall_s", "wall_")):
        ratios = [
            max(other[f"{axis}_to_target"], _SHORTEST_S) / max(run[f"{axis}_to_target"], _SHORTEST_S)
            for (run, other), both in zip(pairs, reached, strict=True)
            if both
        ]
        whole = len(ratios) == len(pairs)
        entry[f"{prefix}speedup"] = statistics.geometric_mean(ratios) if whole else None
        interval = paired_interval(ratios, statistics.geometric_mean) if whole else None
        entry[f"{prefix}low"], entry[f"{prefix}high"] = interval or (None, None)
    for quality in ("final_accuracy", "final_loss", "final_hidden_accuracy"):
        both = [(run.get(quality), other.get(quality)) for run, other in pairs]
        known = all(None not in values for values in both)  # a run that diverged has no loss
        differences = [value - uniforms for value, uniforms in both if value is not None and uniforms is not None]
        differences = differences if known else []
        entry[f"{quality}_difference"] = statistics.fmean(differences) if known else None
        interval = paired_interval(differences, statistics.fmean)
        entry[f"{quality}_low"], entry[f"{quality}_high"] = interval or (None, None)
    return entry


def overall_verdict(results: dict[str, Any]) -> str:
    """The verdict of the arm that the comparison is about: auto, else SIFT, else the first that has one."""
    comparison = results.get("comparison") or {}
    name = next((name for name in ("auto", "sift", *comparison) if name in comparison), None)
    if name is None:
        return "No verdict: the comparison was stopped before an arm finished."
    return str(comparison[name]["verdict"])


def verdict(arm: dict[str, Any], entry: dict[str, Any], target: float) -> str:
    """One sentence on whether an arm paid against uniform training, on equal budgets of reference time.

    "Gain" needs the whole interval of the speed-up above 1 over at least three seeds, "Harm" the whole interval of the
    final accuracy below uniform's; everything else is said to be none, or unproved.
    """
    charged = arm.get("charged", True)
    label = arm["label"] if charged else f"{arm['label']} (an upper bound)"
    seeds = f"{entry['seeds']} seed{'s' * (entry['seeds'] != 1)}"
    finals = f"final accuracy {_points(entry['final_accuracy_difference'])}, at equal cost"
    speedup, low = entry["speedup"], entry["low"]
    goal = f"the target accuracy of {target:.1%}"
    if entry["final_accuracy_high"] is not None and entry["final_accuracy_high"] < 0:
        interval = f"95 % interval {_points(entry['final_accuracy_low'])} to {_points(entry['final_accuracy_high'])}"
        return (
            f"Harm: {label} ended {_points(entry['final_accuracy_difference'])} from uniform training at equal cost "
            f"({interval} over {seeds}; {_pace(entry, goal)})."
        )
    if speedup is None:
        return f"No gain: {label} reached {goal} within the same budget in {entry['reached']} of {seeds} ({finals})."
    if low is None:
        direction = "sooner" if speedup >= 1 else "later"
        return (
            f"Not proved: {label} reached {goal} {_times(speedup)} {direction} than uniform training ({finals}), but "
            f"{seeds} cannot tell gain from luck."
        )
    interval = f"95 % interval {low:.2f} to {entry['high']:.2f} over {seeds}"
    word = "Gain" if low > 1 else "No gain shown"
    return (
        f"{word}: {label} reached {goal} {speedup:.2f} times as fast as uniform training in reference time, "
        f"{'all costs charged' if charged else 'scoring not charged'} ({interval}; {finals})."
    )


def _pace(entry: dict[str, Any], goal: str) -> str:
    if entry["speedup"] is None:
        return f"{goal} reached in {entry['reached']} of {entry['seeds']}"
    return f"{goal} reached {entry['speedup']:.2f} times as fast"


def _points(difference: float) -> str:
    return f"{100 * difference:+.2f} points"


def _times(speedup: float) -> str:
    factor = max(speedup, 1 / speedup) if speedup > 0 else math.inf
    return f"{factor:.2f} times"

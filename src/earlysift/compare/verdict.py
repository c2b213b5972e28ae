"""Time to target, paired comparison with uniform, and the one sentence that says whether it paid."""

import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch

_RESAMPLES = 10_000
Run = dict[str, Any]


def time_to_target(curve: Sequence[dict[str, float]], target: float, axis: str = "reference_s") -> float | None:
    """Where a curve first reaches an accuracy, interpolated linearly between evaluations; None if it never does.

    Example:
        >>> curve = [{"reference_s": 0.0, "accuracy": 0.0}, {"reference_s": 10.0, "accuracy": 0.2}]
        >>> time_to_target(curve, 0.1), time_to_target(curve, 0.3)
        (5.0, None)
    """
    before = None
    for point in curve:
        if point["accuracy"] >= target:
            if before is None:
                return point[axis]
            share = (target - before["accuracy"]) / (point["accuracy"] - before["accuracy"])
            return before[axis] + share * (point[axis] - before[axis])
        before = point
    return None


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


def compare_arms(arms: dict[str, Any], fixed_target: float | None) -> dict[str, Any]:
    """Target per seed, time to it in every run (written into the runs), and each arm against uniform, seed by seed.

    Args:
        arms: The ``arms`` part of results.json; every run gains its times to target.
        fixed_target: Target accuracy; None takes what uniform reaches at the end of its budget on the same seed.

    Returns:
        ``target`` and ``comparison`` of results.json. A speed-up (uniform's reference time to target over the
        arm's, geometric mean over seeds) is given only if every seed reached the target.
    """
    uniform = {run["seed"]: run for run in arms["uniform"]["runs"]}
    targets = {seed: fixed_target or run["final_accuracy"] for seed, run in uniform.items()}
    for arm in arms.values():
        for run in arm["runs"]:
            target = targets.get(run["seed"])
            for axis in ("reference_s", "wall_s"):
                reached = None if target is None else time_to_target(run["curve"], target, axis)
                run[f"{axis}_to_target"] = reached
    comparison = {}
    for name, arm in arms.items():
        runs = [run for run in arm["runs"] if run["seed"] in uniform]
        if name != "uniform" and runs:
            comparison[name] = _against_uniform(runs, [uniform[run["seed"]] for run in runs])
    target_entry = None
    if targets:
        source = "given" if fixed_target else "uniform at the end of its budget, seed by seed"
        target_entry = {"accuracy": statistics.fmean(targets.values()), "source": source}
    return {"target": target_entry, "comparison": comparison}


def _against_uniform(runs: list[Run], uniform: list[Run]) -> dict[str, Any]:
    pairs = list(zip(runs, uniform, strict=True))
    ratios = [
        u["reference_s_to_target"] / max(r["reference_s_to_target"], 1e-9)
        for r, u in pairs
        if r["reference_s_to_target"] is not None and u["reference_s_to_target"] is not None
    ]
    accuracy = [r["final_accuracy"] - u["final_accuracy"] for r, u in pairs]
    loss = [r["final_loss"] - u["final_loss"] for r, u in pairs]
    complete = len(ratios) == len(pairs)
    speedup_interval = paired_interval(ratios, statistics.geometric_mean) if complete else None
    accuracy_interval = paired_interval(accuracy, statistics.fmean)
    loss_interval = paired_interval(loss, statistics.fmean)
    return {
        "seeds": len(pairs),
        "reached": len(ratios),
        "speedup": statistics.geometric_mean(ratios) if complete else None,
        "low": speedup_interval[0] if speedup_interval else None,
        "high": speedup_interval[1] if speedup_interval else None,
        "final_accuracy_difference": statistics.fmean(accuracy),
        "final_accuracy_low": accuracy_interval[0] if accuracy_interval else None,
        "final_accuracy_high": accuracy_interval[1] if accuracy_interval else None,
        "final_loss_difference": statistics.fmean(loss),
        "final_loss_low": loss_interval[0] if loss_interval else None,
        "final_loss_high": loss_interval[1] if loss_interval else None,
    }


def verdict(results: dict[str, Any], arm: str = "sift") -> str:
    """One sentence on whether an arm paid against uniform training, on equal budgets of reference time.

    "Gain" needs the whole interval above 1 over at least three seeds; everything else is said to be none, or unproved.
    """
    entry = results.get("comparison", {}).get(arm)
    if not entry:
        return "No verdict: the comparison was stopped before an arm finished."
    label = results["arms"][arm]["label"]
    target = results["target"]["accuracy"]
    seeds = entry["seeds"]
    finals = f"final accuracy {_signed_points(entry['final_accuracy_difference'])}, at equal cost"
    if entry["speedup"] is None:
        return (
            f"No gain: {label} reached uniform training's target accuracy of {target:.1%} within the same budget in "
            f"{entry['reached']} of {seeds} seed{'s' * (seeds != 1)} ({finals})."
        )
    speedup = entry["speedup"]
    if entry["low"] is None:
        direction = "sooner" if speedup >= 1 else "later"
        return (
            f"Not proved: {label} reached the target accuracy of {target:.1%} {_times(speedup)} {direction} than "
            f"uniform training ({finals}), but {seeds} seed{'s' * (seeds != 1)} cannot tell gain from luck."
        )
    interval = f"95 % interval {entry['low']:.2f} to {entry['high']:.2f} over {seeds} seeds"
    if entry["low"] > 1:
        return (
            f"Gain: {label} reached the target accuracy of {target:.1%} {speedup:.2f} times as fast as uniform "
            f"training in reference time, all costs charged ({interval}; {finals})."
        )
    return (
        f"No gain shown: {label} reached the target accuracy of {target:.1%} {speedup:.2f} times as fast as uniform "
        f"training ({interval}; {finals})."
    )


def _signed_points(difference: float) -> str:
    return f"{100 * difference:+.2f} points"


def _times(speedup: float) -> str:
    factor = max(speedup, 1 / speedup) if speedup > 0 else math.inf
    return f"{factor:.2f} times"

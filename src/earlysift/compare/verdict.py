"""Time to target, paired comparison with uniform training, and one sentence on whether an arm paid."""

import math
import statistics
from collections.abc import Sequence
from functools import cache
from typing import Any

from earlysift.compare.arms import ARMS
from earlysift.control import Control
from earlysift.controller import EARLY_PROBES, EARLY_SHARE, ENOUGH
from earlysift.report.tables import GAIN, HARM, NEVER_ACTED, NO_VERDICT, NOT_PROVED, UNDECIDED, Outcome, outcome

AUTO = "auto"
_CONFIDENCE = 0.95
_FEWEST_SEEDS = 3  # that count as evidence
_SHORTEST_S = 1e-3  # the time to a target that the untrained model meets, for a ratio needs one above 0
_MOST_PERCENT = 25  # larger speed-ups read better as a factor
_SAME = 1e-9  # accuracies closer than this are equal
_LEAST_BUDGETS, _MOST_BUDGETS = 2.0, 10.0  # to advise where nothing was learnt
_SPEEDUPS = ("speedup", "low", "high", "wall_speedup", "wall_low", "wall_high")  # of an entry
Run = dict[str, Any]
Pair = tuple[Run, Run]
"""An arm's run and uniform's on the same seed."""


def time_to_target(curve: Sequence[dict[str, float]], target: float, axis: str = "reference_s") -> float | None:
    """Where the rising fit of a curve reaches an accuracy, interpolated between evaluations; None if it never does.

    The first crossing of a noisy curve tends to come too early; `rising` takes the noise out.

    Example:
        >>> curve = [{"reference_s": 0.0, "accuracy": 0.0}, {"reference_s": 10.0, "accuracy": 0.2}]
        >>> time_to_target(curve, 0.1), time_to_target(curve, 0.3)
        (5.0, None)
    """
    fitted = rising([point["accuracy"] for point in curve])
    first = next((i for i, accuracy in enumerate(fitted) if accuracy >= target), None)
    if not first:
        return None if first is None else curve[0][axis]
    (low, high), (before, after) = fitted[first - 1 : first + 1], curve[first - 1 : first + 1]
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


def paired_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """95 % interval of the mean over seeds by Student's t: ``mean -+ t s / sqrt(n)``; None for fewer than three.

    It covers what it claims at any number of seeds if values are about normal. For two seeds the formula gives twelve
    standard errors to either side, so evidence begins at three.

    Args:
        values: One number per seed, such as the difference to uniform training on that seed.

    Returns:
        Lower and upper end, in the unit of the values.

    Example:
        >>> paired_interval([1.0, 1.0, 1.0])
        (1.0, 1.0)
        >>> [round(end, 3) for end in paired_interval([1.0, 2.0, 3.0])]
        [-0.484, 4.484]

    Reference:
        Student, The probable error of a mean, Biometrika, 1908.
    """
    count = len(values)
    if count < _FEWEST_SEEDS:
        return None
    mean = statistics.fmean(values)
    half_width = t_quantile(count - 1) * statistics.stdev(values) / math.sqrt(count)
    return mean - half_width, mean + half_width


def ratio_interval(ratios: Sequence[float]) -> tuple[float, float] | None:
    """`paired_interval` of a geometric mean: taken on logarithms, which treat twice and half as fast alike.

    Args:
        ratios: One positive number per seed, such as uniform's time to the target over an arm's.

    Example:
        >>> [round(end, 3) for end in ratio_interval([0.5, 1.0, 2.0])]
        [0.179, 5.595]
    """
    interval = paired_interval([math.log(ratio) for ratio in ratios])
    return None if interval is None else (math.exp(interval[0]), math.exp(interval[1]))


@cache
def t_quantile(degrees: int) -> float:
    """The t with 95 % of Student's distribution between -t and t, from its closed form at whole degrees of freedom.

    Args:
        degrees: Degrees of freedom, 1 or more.

    Example:
        >>> [round(t_quantile(degrees), 3) for degrees in (1, 2, 4)]
        [12.706, 4.303, 2.776]

    Reference:
        Abramowitz and Stegun, Handbook of Mathematical Functions, 1964, 26.7.3 and 26.7.4.
    """
    low, high = 0.0, math.pi / 2
    for _ in range(60):  # bisection of the angle atan(t / sqrt(degrees)), to the last bit
        angle = (low + high) / 2
        low, high = (angle, high) if _central_share(angle, degrees) < _CONFIDENCE else (low, angle)
    return math.tan(low) * math.sqrt(degrees)


def _central_share(angle: float, degrees: int) -> float:
    odd = degrees % 2
    term, total = math.cos(angle) if odd else 1.0, 0.0
    for power in range(odd, degrees - 1, 2):
        total += term
        term *= math.cos(angle) ** 2 * (power + 1) / (power + 2)
    return 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total


def judged(results: dict[str, Any]) -> dict[str, Any]:
    """Target, comparison and verdict of results.json, from its finished runs and by the present rules.

    Args:
        results: Everything else that results.json holds; every finished run gains its times to target.

    Returns:
        ``target``, ``comparison`` and ``verdict``.
    """
    finished = {
        name: {**arm, "runs": [run for run in arm["runs"] if run["finished"]]} for name, arm in results["arms"].items()
    }
    config, probe = results["config"], results["operations_ms"].get("probe")
    compared = compare_arms(
        finished,
        config["target"],
        config["target_share"],
        baseline=results["baseline"]["accuracy"],
        probe_ms=probe and probe["median"],
        in_steps=config.get("steps") is not None,
    )
    return {**compared, "verdict": overall_verdict(compared)}


def compare_arms(
    arms: dict[str, Any],
    fixed_target: float | None,
    target_share: float,
    *,
    baseline: float = 0.0,
    probe_ms: float | None = None,
    in_steps: bool = False,
) -> dict[str, Any]:
    """Target per seed, time to it in every run (written into the runs), and each arm against uniform, seed by seed.

    Args:
        arms: The ``arms`` part of results.json with finished runs only; every run gains its times to target.
        fixed_target: Target accuracy; None takes a share of what uniform reaches at the end of its budget on the same
            seed (of its rising fit, which one lucky evaluation does not move).
        target_share: That share.
        baseline: Accuracy of a model that ignores its input. Where uniform's rising fit does not end above it on every
            seed, nothing is judged.
        probe_ms: What a probe costs, to say which budget would let auto decide; None if it is not known.
        in_steps: Whether budgets are given in steps of uniform training, and not in seconds.

    Returns:
        ``target`` and ``comparison`` of results.json. A speed-up (uniform's time to target over the arm's, geometric
        mean over seeds) is given only if every seed reached the target. ``withheld`` says why an arm is not judged: "no
        verdict" (uniform training learnt nothing, or diverged), "never acted", "could not decide"; None if it is.
    """
    uniform = {run["seed"]: run for run in arms.get("uniform", {}).get("runs", [])}
    targets = {
        seed: fixed_target or target_share * rising([point["accuracy"] for point in run["curve"]])[-1]
        for seed, run in uniform.items()
    }
    for run in (run for arm in arms.values() for run in arm["runs"]):
        target = targets.get(run["seed"])
        for axis in ("reference_s", "wall_s"):
            run[f"{axis}_to_target"] = None if target is None else time_to_target(run["curve"], target, axis)
    if not targets:
        return {"target": None, "comparison": {}}
    mean_target = statistics.fmean(targets.values())
    source = "given" if fixed_target else f"{target_share:.0%} of uniform's final accuracy, seed by seed"
    nothing_learnt = _nothing_learnt(list(uniform.values()), baseline, in_steps)
    comparison = {}
    for name, arm in arms.items():
        pairs = [(run, uniform[run["seed"]]) for run in arm["runs"] if run["seed"] in uniform]
        if name == "uniform" or not pairs:
            continue
        entry = _against_uniform(pairs)
        withheld: Outcome | None = None
        if nothing_learnt:
            entry |= dict.fromkeys(_SPEEDUPS)
            withheld, sentence = NO_VERDICT, nothing_learnt
        elif name == AUTO and _could_not_decide(pairs):
            withheld, sentence = UNDECIDED, _undecided_verdict(arm, pairs, probe_ms, in_steps)
        elif name != AUTO and all(_same_curve(run, other) for run, other in pairs):
            withheld, sentence = NEVER_ACTED, _idle_verdict(name, arm, entry)
        else:
            sentence = verdict(arm, entry, mean_target)
        comparison[name] = entry | {"withheld": withheld and withheld.word, "verdict": sentence}
    return {"target": {"accuracy": mean_target, "source": source}, "comparison": comparison}


def budget_to_learn(curve: Sequence[dict[str, float]], baseline: float) -> float | None:
    """Seconds that uniform training needs at least to beat a model that ignores its input; None if it did.

    The budget times ``(baseline - start) / (end - start)`` of its rising fit, as if accuracy went on rising at its mean
    pace so far. That is no forecast (a plateau may end at any time), so the result is rounded and between two and ten
    budgets: a lower bound.

    Args:
        curve: Of uniform training on one seed.
        baseline: Accuracy of the model that ignores its input.

    Example:
        >>> curve = [{"reference_s": 0.0, "accuracy": 0.0}, {"reference_s": 60.0, "accuracy": 0.02}]
        >>> budget_to_learn(curve, 0.1), budget_to_learn(curve, 0.01)
        (300.0, None)
    """
    fitted = rising([point["accuracy"] for point in curve])
    start, end = fitted[0], fitted[-1]
    if end > baseline + _SAME:
        return None
    budgets = (baseline - start) / (end - start) if end > start else _MOST_BUDGETS
    return _rounded_up(curve[-1]["reference_s"] * min(max(budgets, _LEAST_BUDGETS), _MOST_BUDGETS))


def budget_to_decide(probe_ms: float) -> float:
    """Seconds of training in which auto makes the probes that a decision needs, before greedy selection has to end.

    ``ENOUGH probe / (probe_share s)``, with s the share of the probes that comes before ``end_share`` of the training:
    two fifths in its first tenth, the others evenly. Rounded up to two digits.

    Args:
        probe_ms: What a probe costs.

    Example:
        >>> budget_to_decide(100.0)
        23.0
    """
    before_end = EARLY_PROBES + (1 - EARLY_PROBES) * (Control.end_share - EARLY_SHARE) / (1 - EARLY_SHARE)
    return _rounded_up(ENOUGH * probe_ms / 1e3 / (Control.probe_share * before_end))


def _nothing_learnt(uniform: list[Run], baseline: float, in_steps: bool) -> str | None:
    """Why these runs of uniform training leave nothing to judge, if so."""
    diverged = sum(run["final_loss"] is None for run in uniform)
    if diverged:
        return (
            f"No verdict: uniform training ended without a finite loss on {diverged} of {_seeds(len(uniform))}; give a "
            "smaller learning rate."
        )
    budgets_s = [budget_s for run in uniform if (budget_s := budget_to_learn(run["curve"], baseline)) is not None]
    if not budgets_s:
        return None
    return (
        "No verdict: nothing was learnt in this budget, as uniform training did not beat a model that ignores its "
        f"input ({baseline:.1%} accuracy) on {len(budgets_s)} of {_seeds(len(uniform))}; give at least "
        f"{_budget(max(budgets_s), uniform[0], in_steps)}."
    )


def _could_not_decide(pairs: list[Pair]) -> bool:
    """Whether auto never switched, and had too few probes for a decision on every seed."""
    return not any(run.get("events") for run, _ in pairs) and max(_probe_counts(pairs)) < ENOUGH


def _probe_counts(pairs: list[Pair]) -> list[int]:
    return [len(run.get("control", [])) for run, _ in pairs]


def _same_curve(run: Run, other: Run) -> bool:
    """Whether two runs took the same steps: another batch or weight would change the curve."""
    one, two = ([(p["step"], p["accuracy"], p["loss"]) for p in each["curve"]] for each in (run, other))
    return one == two


def _against_uniform(pairs: list[Pair]) -> dict[str, Any]:
    """The numbers of an entry of the comparison."""
    reached = [None not in (run["reference_s_to_target"], other["reference_s_to_target"]) for run, other in pairs]
    entry: dict[str, Any] = {"seeds": len(pairs), "reached": sum(reached)}
    for axis, prefix in (("reference_s", ""), ("wall_s", "wall_")):
        ratios = []
        if all(reached):
            times_s = [[max(run[f"{axis}_to_target"], _SHORTEST_S) for run in pair] for pair in pairs]
            ratios = [uniform_s / arm_s for arm_s, uniform_s in times_s]
        entry[f"{prefix}speedup"] = statistics.geometric_mean(ratios) if ratios else None
        entry[f"{prefix}low"], entry[f"{prefix}high"] = ratio_interval(ratios) or (None, None)
    for quality in ("final_accuracy", "final_loss", "final_hidden_accuracy"):
        known = all(run.get(quality) is not None for pair in pairs for run in pair)  # a run that diverged has no loss
        differences = [run[quality] - uniform[quality] for run, uniform in pairs] if known else []
        entry[f"{quality}_difference"] = statistics.fmean(differences) if known else None
        entry[f"{quality}_low"], entry[f"{quality}_high"] = paired_interval(differences) or (None, None)
    return entry


def overall_verdict(results: dict[str, Any]) -> str:
    """The verdict on the arm that the comparison is about: auto, else SIFT, else the first that acted."""
    comparison = results.get("comparison") or {}
    acted = [name for name, entry in comparison.items() if entry.get("withheld") != NEVER_ACTED.word]
    name = next((name for name in (AUTO, "sift", *acted, *comparison) if name in comparison), None)
    if name is None:
        return "No verdict: no arm beside uniform training has finished."
    return str(comparison[name]["verdict"])


def verdict(arm: dict[str, Any], entry: dict[str, Any], target: float) -> str:
    """One sentence on whether an arm paid against uniform training, on equal budgets of reference time.

    "Gain" needs the whole interval of the speed-up above 1 over at least three seeds, "Harm" the whole interval of the
    final accuracy below uniform's. Everything else is no gain, or not proved.
    """
    charged = arm.get("charged", True)
    label = arm["label"] if charged else f"{arm['label']} (an upper bound)"
    seeds = _seeds(entry["seeds"])
    goal = f"the target accuracy of {target:.1%}"
    speedup, difference = entry["speedup"], entry["final_accuracy_difference"]
    reached = f"reached {goal} on {entry['reached']} of {seeds}"
    pace = None if speedup is None else _pace(speedup, goal)
    final = f"final accuracy {_points(difference)}, at equal cost"
    word = outcome(entry)
    if word is HARM:
        low, high = (_points(entry[f"final_accuracy_{end}"]) for end in ("low", "high"))
        return (
            f"Harm: {label} ended {_points(-difference).removeprefix('+')} below uniform training at equal cost (95 % "
            f"interval {low} to {high} over {seeds}; it {pace or reached})."
        )
    if pace is None:
        return f"No gain: {label} {reached} within the same budget ({final})."
    if word is NOT_PROVED:
        return f"Not proved: {label} {pace} ({final}), but {seeds} cannot tell gain from luck."
    return (
        f"{'Gain' if word is GAIN else 'No gain shown'}: {label} {pace} in reference time, "
        f"{'all costs charged' if charged else 'scoring not charged'} (speed-up {speedup:.2f}, 95 % interval "
        f"{entry['low']:.2f} to {entry['high']:.2f} over {seeds}; {final})."
    )


def _undecided_verdict(arm: dict[str, Any], pairs: list[Pair], probe_ms: float | None, in_steps: bool) -> str:
    counts = sorted({min(_probe_counts(pairs)), max(_probe_counts(pairs))})
    budget = ""
    if probe_ms is not None:
        budget = f"; give at least {_budget(budget_to_decide(probe_ms), pairs[0][1], in_steps)}"
    return (
        f"Could not decide: {arm['label']} trained uniformly on {_seeds(len(pairs))}, with "
        f"{' to '.join(map(str, counts))} of the {ENOUGH} probes that a decision needs{budget}."
    )


def _idle_verdict(name: str, arm: dict[str, Any], entry: dict[str, Any]) -> str:
    why = f": {ARMS[name].idle}" if name in ARMS and ARMS[name].idle else ""
    return f"Never acted: {arm['label']} took the same steps as uniform training on {_seeds(entry['seeds'])}{why}."


def _pace(speedup: float, goal: str) -> str:
    """How a speed-up reads: in per cent up to a quarter, as a factor beyond.

    Example:
        >>> _pace(0.99, "the target")
        'was 1 % slower than uniform training to the target'
        >>> _pace(2.1, "the target")
        'reached the target 2.1 times as fast as uniform training'
    """
    percent = round(100 * abs(speedup - 1))
    if percent == 0:
        return f"was as fast as uniform training to {goal}"
    if percent <= _MOST_PERCENT:
        return f"was {percent} % {'faster' if speedup > 1 else 'slower'} than uniform training to {goal}"
    if speedup > 1:
        return f"reached {goal} {speedup:.1f} times as fast as uniform training"
    return f"took {1 / speedup:.1f} times as long as uniform training to {goal}"


def _points(difference: float) -> str:
    return f"{round(100 * difference, 2) + 0.0:+.2f} points"


def _seeds(count: int) -> str:
    return f"{count} seed{'s' * (count != 1)}"


def _budget(seconds: float, uniform: Run, in_steps: bool) -> str:
    """A budget in words, in seconds or in as many steps as a run of uniform training took in them."""
    if not in_steps:
        return f"{seconds:g} s"
    return f"{_rounded_up(seconds * uniform['steps'] / uniform['curve'][-1]['reference_s']):,g} steps"


def _rounded_up(seconds: float) -> float:
    """To two digits.

    Example:
        >>> _rounded_up(123.0), _rounded_up(0.81)
        (130.0, 0.81)
    """
    unit = 10.0 ** (math.floor(math.log10(seconds)) - 1) if seconds > 0 else 1.0
    return round(math.ceil(round(seconds / unit, 6)) * unit, 9)

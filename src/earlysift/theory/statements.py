"""Every statement on random instances: how often it was broken (never), and how tight it is."""

import math
from functools import partial
from statistics import median

import torch
from torch import Generator

from earlysift.report.chart import Axis
from earlysift.report.series import LINES
from earlysift.seeds import seeded
from earlysift.theory import bounds, checks
from earlysift.theory.asked import Asked, Show
from earlysift.theory.findings import Chart, Finding, Table, measure, trace
from earlysift.theory.problems import objective, synthetic
from earlysift.theory.runs import additive, gradient_norms, multiplicative, run


def statements(asked: Asked, show: Show) -> Finding:
    """Every statement on random instances: how many, how many broken, how tight."""
    seen: dict[str, list[checks.Check]] = {}
    count = asked.count(100)
    for i in range(count):
        for name, check in _instance(seeded(asked.seed, "statements", i)).items():
            seen.setdefault(name, []).append(check)
        show((i + 1) / count)
    rows = []
    for name, found in seen.items():
        ratios = sorted(check.tightness for check in found if not math.isnan(check.tightness))
        broken = sum(not check.holds for check in found)
        rows.append((name, len(found), broken, median(ratios), ratios[0], ratios[-1]))
    broken = sum(row[2] for row in rows)
    upper = [name for name, found in seen.items() if all(check.kind == "at most" for check in found)]
    curves = []
    for (name, found), style in zip(seen.items(), LINES * 2, strict=False):
        ratios = sorted(min(check.tightness, 5.0) for check in found if not math.isnan(check.tightness))
        shares = [(i + 0.5) / len(ratios) for i in range(len(ratios))]
        curves.append(trace(name, style, {int(name not in upper): (shares, [ratios])}, 2))
    return Finding(
        "statements",
        "Every statement on random instances",
        f"{count} random instances of each statement, {broken} violations. Least squares and logistic "
        f"regression of random "
        "size, condition, noise and tail; random R, b, eta, d, e and r; errors of a score as bad as "
        "they may be, in half of "
        "the instances.",
        [Table("Instances", ("statement", "instances", "violations", "median ratio", "least", "largest"), rows)],
        Chart(
            (measure("measured / bound, upper bounds", bound=1.0), measure("lower bounds and equalities", bound=1.0)),
            Axis("x", "share of the instances, sorted"),
            curves,
            "Measured over bound, cut at 5. Upper bounds (paths, T1, T2, T7 in a run) stay below 1, "
            "lower bounds (T3 and T4 pool by "
            "pool) above, equalities (T5 to T7) at 1 within the error of Monte Carlo.",
        ),
    )


def _instance(generator: Generator) -> dict[str, checks.Check]:
    """One random instance of each statement."""

    def real(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=generator, dtype=torch.float64))

    def whole(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    given = synthetic(
        generator,
        kind=("squared", "logistic")[whole(0, 1)],
        samples=whole(20, 200),
        width=whole(2, 10),
        condition=real(1, 30),
        noise=float(whole(0, 1)) or 1e-3,
        tail=real(0, 1.5),
    )
    pool = whole(2, 16)
    kept, worst = whole(1, pool), bool(whole(0, 1))
    eta, steps, seeds = real(0.02, 0.95) / given.smoothness, whole(20, 200), 16

    train = partial(run, given, eta=eta, steps=steps, seeds=seeds, generator=generator)
    choose = partial(train, pool=pool, kept=kept, rule="greedy")
    greedy = choose()
    u = checks.greedy_minimum(given, pool, kept, steps=200)
    exact = checks.check_run(given, greedy, eta=eta, pool=pool, kept=kept, comparator=u)
    plain = train()
    uniform = checks.check_run(given, plain, eta=eta)
    d, e, r = real(0, 0.9), real(0, 0.2) * objective(given, given.start).item(), real(-1, 1)
    factor = bounds.multiplicative_gain(1.0, d)
    scaled, shifted = multiplicative(d, worst=worst), additive(e, worst=worst)
    by_scaled, by_shifted = choose(score=scaled), choose(score=shifted)
    rho = checks.gains(given, by_scaled.iterates[:-1], pool, kept)
    rho_shifted = checks.gains(given, by_shifted.iterates[:-1], pool, kept)
    with_d = checks.check_run(given, by_scaled, eta=eta, pool=pool, kept=kept, gain=factor * rho)
    with_e = checks.check_run(given, by_shifted, eta=eta, pool=pool, kept=kept, gain=rho_shifted, lost=2 * e)
    weighted = train(pool=pool, rule="unbiased", score=gradient_norms)
    points = greedy.iterates[-1].repeat(20, 1)
    return {
        "path: the inequality behind T1, on every seed": exact["path"],
        "T1: greedy SGD": exact["T1"],
        "T1+: without the loss of step size": exact["sharp"],
        "T1+: from the minimum of G": exact["comparator"],
        "T1+: the gain of every step": exact["time"],
        "T2: SGD": uniform["T1"],
        "T2+: without the loss of step size": uniform["sharp"],
        "T3: a factor, pool by pool": checks.check_pools(given, points, scaled, pool, kept, generator, factor=factor),
        "T3 in T1: a factor, in a run": with_d["T1"],
        "T4: a distance, pool by pool": checks.check_pools(given, points, shifted, pool, kept, generator, lost=2 * e),
        "T4 in T1: a distance, in a run": with_e["T1"],
        "T5: correlated scores": checks.check_correlated_gain(r, pool, kept, 4000, generator),
        "T6: argmax kept": checks.check_agreement(r, pool, 4000, generator),
        "T6 of squares: argmax kept": checks.check_agreement(r, pool, 4000, generator, squares=True),
        "T7: second moment in pools": checks.check_second_moment(given, given.start + 1, pool, 4000, generator),
        "T7+: the unbiased rule, in a run": checks.check_unbiased_run(given, weighted, eta=eta, pool=pool),
    }

"""Every statement on random instances: how often it was violated (never), and how tight it is."""

import math
from collections import defaultdict
from functools import partial
from statistics import median

import torch
from torch import Generator

from earlysift.report.series import LINES
from earlysift.seeds import seeded
from earlysift.theory import checks
from earlysift.theory.findings import Finding, Lines, Options, Show, Table
from earlysift.theory.problems import synthetic
from earlysift.theory.runs import additive, gradient_norms, multiplicative, run


def statements(options: Options, show: Show) -> Finding:
    """Every statement on random instances: number of instances, violations, tightness."""
    found: dict[str, list[checks.Check]] = defaultdict(list)
    count = options.count(100)
    for i in range(count):
        for name, check in _instance(seeded(options.seed, "statements", i)).items():
            found[name].append(check)
        show((i + 1) / count)
    lines: Lines = {}
    rows = []
    for name, instances in found.items():
        ratios = sorted(check.tightness for check in instances if not math.isnan(check.tightness))
        broken = sum(not check.holds for check in instances)
        rows.append((name, len(instances), broken, median(ratios), ratios[0], ratios[-1]))
        shares = [(i + 0.5) / len(ratios) for i in range(len(ratios))]
        m = 0 if instances[0].kind == "at most" else 1
        lines[name] = {m: (shares, [[min(ratio, 5.0) for ratio in ratios]])}
    return Finding(
        "statements",
        "Every statement on random instances",
        f"{count} random instances of each statement, {sum(row[2] for row in rows)} violations. Least squares and "
        "logistic regression of random size, condition, noise and tail; random R, b, eta, d, e and r; errors of a "
        "score as bad as they may be, in half of the instances.",
        [Table("Instances", ("statement", "instances", "violations", "median ratio", "least", "largest"), rows)],
        levels={"measured / bound, upper bounds": {"bound": 1.0}, "lower bounds and equalities": {"bound": 1.0}},
        axis_label="share of the instances, sorted",
        lines=lines,
        styles=LINES * 2,
        note="Measured over bound, cut at 5. Upper bounds (paths, T1, T2, T7 in a run) stay below 1, lower bounds (T3 "
        "and T4 pool by pool) above, equalities (T5 to T7) at 1 within the error of Monte Carlo.",
    )


def _instance(generator: Generator) -> dict[str, checks.Check]:
    """One random instance of each statement."""

    def real(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=generator, dtype=torch.float64))

    def whole(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    problem = synthetic(
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
    eta, steps, seeds = real(0.02, 0.95) / problem.smoothness, whole(20, 200), 16

    train = partial(run, problem, eta=eta, steps=steps, seeds=seeds, generator=generator)
    choose = partial(train, pool=pool, kept=kept, rule="greedy")
    greedy = choose()
    exact = checks.check_run(greedy, comparator=checks.greedy_minimum(problem, pool, kept, steps=200))
    uniform = checks.check_run(train())
    d, e, r = real(0, 0.9), real(0, 0.2) * problem.objective(problem.start).item(), real(-1, 1)
    scaled, shifted = multiplicative(d, worst=worst), additive(e, worst=worst)
    by_d, by_e = choose(score=scaled.score), choose(score=shifted.score)
    with_d = checks.check_run(by_d, gain=scaled.factor * checks.gains(problem, by_d.iterates[:-1], pool, kept))
    with_e = checks.check_run(by_e, lost=shifted.lost)
    weighted = train(pool=pool, rule="unbiased", score=gradient_norms)
    check_pools = partial(checks.check_pools, problem, greedy.iterates[-1].repeat(20, 1))
    return {
        "path: the inequality behind T1, on every seed": exact["path"],
        "T1: greedy SGD": exact["T1"],
        "T1+: without the loss of step size": exact["sharp"],
        "T1+: from the minimum of G": exact["comparator"],
        "T1+: the gain of every step": exact["time"],
        "T2: SGD": uniform["T1"],
        "T2+: without the loss of step size": uniform["sharp"],
        "T3: a factor, pool by pool": check_pools(scaled, pool, kept, generator),
        "T3 in T1: a factor, in a run": with_d["T1"],
        "T4: a distance, pool by pool": check_pools(shifted, pool, kept, generator),
        "T4 in T1: a distance, in a run": with_e["T1"],
        "T5: correlated scores": checks.check_correlated_gain(r, pool, kept, 4000, generator),
        "T6: argmax kept": checks.check_agreement(r, pool, 4000, generator),
        "T6 of squares: argmax kept": checks.check_agreement(r, pool, 4000, generator, squares=True),
        "T7: second moment in pools": checks.check_second_moment(problem, problem.start + 1, pool, 4000, generator),
        "T7+: the unbiased rule, in a run": checks.check_unbiased_run(weighted),
    }

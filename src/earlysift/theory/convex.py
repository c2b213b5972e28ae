"""Greedy SGD on convex problems: the fast start, the floor, and what errors of the score cost."""

import math
from collections import defaultdict
from dataclasses import replace
from functools import partial

import torch

from earlysift import costs
from earlysift.report.series import Style
from earlysift.seeds import seeded
from earlysift.theory import bounds, checks, runs
from earlysift.theory.crossing import first, mean_path
from earlysift.theory.findings import EXACT, GREEDY, UNIFORM, Finding, Lines, Options, Row, Show, Table, log10
from earlysift.theory.problems import bundled, synthetic
from earlysift.theory.runs import Approximation, Score


def greedy(options: Options, show: Show) -> Finding:
    """Greedy against uniform SGD: the fast start and the floor, against T1, T2 and their sharper versions."""
    generator = seeded(options.seed, "greedy")
    problems = [
        synthetic(generator, name="least squares, interpolating", noise=0.0).started_far(generator),
        synthetic(generator, name="least squares, one-sided noise", tail=1.0).started_far(generator),
        synthetic(generator, name="logistic", kind="logistic").started_far(generator),
        bundled("diabetes").started_far(generator),
        bundled("breast_cancer").started_far(generator),
    ]
    pool, steps, seeds = 4, options.steps(1500), options.count(12)
    at, counts = range(25, steps + 1, 25), torch.arange(1, steps + 1, dtype=torch.float64)[:, None, None]
    lines: Lines = {name: {} for name in ("SGD", f"greedy, R = {pool}", "T2+", "T1+", "unbiased")}
    rows: list[Row] = []
    bound_rows: list[Row] = []
    ratios, early_gains = [], []
    for m, problem in enumerate(problems):
        eta = 0.1 / problem.smoothness
        train = partial(runs.run, problem, eta=eta, steps=steps, seeds=seeds, generator=generator)
        uniform, selected = train(), train(pool=pool, rule="greedy")
        weighted = train(pool=pool, rule="unbiased", score=runs.gradient_norms)
        for name, trained in (("SGD", uniform), (f"greedy, R = {pool}", selected), ("unbiased", weighted)):
            means = trained.iterates[:-1].cumsum(dim=0) / counts
            curve = problem.objective(means)[[k - 1 for k in at]]
            lines[name][m] = (at, [log10(values) for values in curve.T])
        gain = checks.gains(problem, selected.iterates[:-1], pool)
        least, level = gain.cummin(dim=0).values.amin(dim=1), checks.floor(problem, pool)
        for name, rho, low in (("T2+", torch.ones(steps), problem.minimum), ("T1+", least, level)):
            setting = (eta, problem.smoothness, low)
            promised = [bounds.sharp_bound(problem.distance2, k, *setting, rho[k - 1].item()) for k in at]
            lines[name][m] = (at, [log10(torch.tensor(promised, dtype=torch.float64))])
        half = (problem.objective(problem.start).item() + problem.minimum) / 2
        sgd_steps, greedy_steps = (
            first(problem.objective(each.iterates).mean(dim=1) <= half) for each in (uniform, selected)
        )
        ratio = sgd_steps / greedy_steps if sgd_steps and greedy_steps else None
        ratios += [ratio] if ratio else []
        early_gains.append(gain[: greedy_steps or 1].mean().item())
        rows.append((problem.name, gain.min().item(), early_gains[-1], sgd_steps, greedy_steps, ratio))
        for name, found in (("SGD", checks.check_run(uniform)), ("greedy", checks.check_run(selected, gain=gain))):
            sharp = found["sharp"]
            bound_rows.append((problem.name, name, sharp.measured, found["T1"].bound, sharp.bound, sharp.tightness))
        show((m + 1) / len(problems))
    return Finding(
        "greedy",
        "Greedy against uniform: a faster start, and a floor",
        f"Half-way to the minimum, greedy SGD (R = {pool}) needed {min(ratios):.2f} to {max(ratios):.2f} times fewer "
        f"steps than SGD; the gain there was {min(early_gains):.2f} to {max(early_gains):.2f}. Every curve stays below "
        "its bound.",
        [
            Table(
                "Steps half-way to the minimum",
                ("problem", "least gain", "gain to half-way", "steps to half-way, SGD", "greedy", "SGD / greedy"),
                rows,
            ),
            Table(
                f"Mean iterate after {steps} steps against the bounds",
                ("problem", "", "F(mean w)", "T1, T2", "T1+, T2+", "measured / T1+, T2+"),
                bound_rows,
            ),
        ],
        levels={f"log10 F(mean w), {problem.name}": {} for problem in problems},
        axis_label="steps",
        lines=lines,
        styles=(UNIFORM, GREEDY, Style(UNIFORM.color, "7 3"), Style(GREEDY.color, "7 3"), EXACT),
        note=f"F at the mean iterate; {seeds} seeds, bands from the lowest to the highest. Dashed: the bounds T1+ "
        "(with the least gain so far) and T2+, proved in docs/theory.md.",
    )


def floor(options: Options, show: Show) -> Finding:
    """The floor of greedy SGD against the size of the pool."""
    generator = seeded(options.seed, "floor")
    make = partial(synthetic, generator, width=5, condition=3)
    problems = [
        make(name="Gaussian noise"),
        make(name="one-sided noise", tail=1.0),
        make(name="5 % moved targets", noise=0.3, spike=0.05),
    ]
    shapes = ((1, 1), (2, 1), (4, 1), (8, 1), (8, 2), (16, 1), (16, 4), (32, 1), (32, 8))  # R, and b = 1 or R / 4
    seeds, steps = options.count(8), options.steps(3000)
    lines: Lines = defaultdict(dict)
    rows = []
    for m, problem in enumerate(problems):
        minimum, eta = problem.minimum, 0.005 / problem.smoothness
        points: dict[str, list[tuple[float, list[float]]]] = defaultdict(list)
        for i, (pool, kept) in enumerate(shapes):
            u = checks.greedy_minimum(problem, pool, kept, options.steps(1000))
            # From u, with small steps: where greedy SGD stays.
            train = partial(runs.run, replace(problem, start=u), eta=eta, pool=pool, kept=kept, rule="greedy")
            trained = train(steps=steps, seeds=seeds, generator=generator)
            stays = problem.objective(trained.iterates[steps // 2 :].mean(dim=0)) / minimum
            exact = problem.objective(u).item() / minimum
            gain = checks.gains(problem, u[None, None], pool, kept).item()
            constant = checks.floor(problem, pool, kept) / (gain * minimum)
            check = checks.check_run(trained, comparator=u)["comparator"]
            values = {"measured": stays.tolist(), "F at the minimum of G": [exact], "M* / (rho F*)": [constant]}
            for name, value in values.items():
                points[f"{name}, b = {1 if kept == 1 else 'R / 4'}"].append((math.log2(pool), value))
            ends = (exact, check.bound / minimum, check.tightness, constant)
            rows.append((problem.name, pool, kept, stays.mean().item(), *ends))
            show((m + (i + 1) / len(shapes)) / len(problems))
        for name, found in points.items():
            sizes, bands = zip(*found, strict=True)
            lines[name][m] = (sizes, list(zip(*bands, strict=True)))
    worst = max(rows, key=lambda row: row[3])
    return Finding(
        "floor",
        "The floor of greedy selection grows with the pool",
        f"Greedy SGD with small steps stays where G is least, not F: at {worst[3]:.2f} F* on {worst[0]} with R = "
        f"{worst[1]} and b = 1. With symmetric noise the floor is small: the hardest samples on both sides balance.",
        [
            Table(
                "Floor over the minimum, F / F*",
                (
                    *("noise", "R", "b", "measured", "F(argmin G) / F*"),
                    *("T1+ from argmin G", "measured / T1+", "M* / (rho F*)"),
                ),
                rows,
            )
        ],
        levels={f"floor / F*, {problem.name}": {"uniform": 1.0} for problem in problems},
        axis_label="log2 of R",
        lines=lines,
        styles=[Style(line.color, dashes, strong=True) for line in (GREEDY, EXACT) for dashes in ("", "2 3", "7 3")],
        note="Measured: second half of runs that start at the minimum u of G, mean iterate of each of the seeds. "
        "Dashed: the constant of T1 for small steps, with the gain at u.",
    )


def errors(options: Options, show: Show) -> Finding:
    """What errors of the score cost: factors d, distances e, correlations r, exits that see a part."""
    generator = seeded(options.seed, "errors")
    problem = synthetic(generator, samples=500, width=20, condition=10, tail=0.5).started_far(generator)
    pool, kept, pools = 8, 1, options.count(8000)
    path = mean_path(problem, eta=0.2 / problem.smoothness, steps=400, pool=pool)
    w = path[100]  # on the way: neither the start, where all losses are large, nor the end
    mean_loss = problem.objective(w).item()

    def exact_gain(score: Score) -> float:
        return checks.gains(problem, w[None, None], pool, kept, score).item()

    def measured(approximation: Approximation) -> tuple[float, float]:
        check = checks.check_pools(problem, w.expand(pools, -1), approximation, pool, kept, generator)
        return check.measured / mean_loss, check.bound / mean_loss

    rho = exact_gain(runs.exact_loss)
    lines: Lines = {"errors at random": {}, "worst errors": {}, "bound": {}, "T5": {}}
    rows: list[Row] = []
    sizes = [i / 10 for i in range(10)]
    for m, (kind, approximate, unit, promised) in enumerate(
        (
            ("d", runs.multiplicative, 1.0, [bounds.multiplicative_gain(rho, d) for d in sizes]),
            ("e / F", runs.additive, mean_loss, [rho - 2 * e for e in sizes]),
        )
    ):
        random, worst = (
            [measured(approximate(unit * size, worst=is_worst)) for size in sizes] for is_worst in (False, True)
        )
        lines["errors at random"][m] = (sizes, [[gain for gain, _ in random]])
        lines["worst errors"][m] = (sizes, [[gain for gain, _ in worst]])
        lines["bound"][m] = (sizes, [promised])
        for size, (gain, _), (worst_gain, least), limit in zip(sizes, random, worst, promised, strict=True):
            rows.append((kind, size, gain, worst_gain, limit, worst_gain / least if least > 0 else None))
        show((m + 1) / 4)
    rs, features = [i / 5 - 1 for i in range(11)], list(range(1, 21))
    by_r = [measured(Approximation(runs.correlated(r)))[0] for r in rs]
    exits = [runs.early_exit(k) for k in features]
    everyone = runs.population(problem, w.unsqueeze(0))
    exit_rs = [torch.corrcoef(torch.cat([score(everyone), everyone.losses]))[0, 1].item() for score in exits]
    for m, labels, xs, correlations, gains in (
        (2, ["r"] * len(rs), rs, rs, by_r),
        (3, [f"exit, r = {r:.3f}" for r in exit_rs], features, exit_rs, list(map(exact_gain, exits))),
    ):
        t5 = [costs.approximate_gain(rho, r) for r in correlations]
        lines["errors at random"][m] = (xs, [gains])
        lines["T5"][m] = (xs, [t5])
        rows += [
            (label, x, gain, None, predicted, gain / predicted if predicted > 0 else None)
            for label, x, gain, predicted in zip(labels, xs, gains, t5, strict=True)
        ]
    train = partial(runs.run, problem, eta=1e-3, steps=50, seeds=4, pool=pool, rule="greedy")
    exact, same = train(generator=seeded(0)), train(generator=seeded(0), score=runs.order_kept)
    show(1.0)
    return Finding(
        "errors",
        "What errors of the score cost",
        f"With exact losses the gain is {rho:.2f} here (R = {pool}). A score that keeps the order takes the same steps "
        f"({'bit for bit' if torch.equal(same.iterates, exact.iterates) else 'NOT the same'}); random errors cost "
        f"far less than the worst ones; a score that ranks backwards (r = -1) has a gain of {by_r[0]:.2f}: worse than "
        "uniform.",
        [
            Table(
                "Gain against error",
                ("error", "amount", "gain, random errors", "gain, worst errors", "T3, T4 or T5", "ratio"),
                rows,
            )
        ],
        levels={
            f"gain {label}": {"uniform": 1.0}
            for label in ("against d (T3)", "against e / F (T4)", "against r (T5)", "of an exit by features seen (T5)")
        },
        axis_label="size of the error, correlation, or features that the exit sees",
        lines=lines,
        styles=(GREEDY, Style(GREEDY.color, "2 3"), Style("#9166d6", "7 3"), Style("#159a6c", "7 3")),
        note="T3 and T4 are lower bounds; T5 is an equality for Gaussian losses, and these are not Gaussian.",
    )

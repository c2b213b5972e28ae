"""What `earlysift theory` runs: each experiment measures what a statement speaks of, and sets both side by side."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import torch
from torch import Generator, Tensor

from earlysift import costs
from earlysift.report.chart import Axis
from earlysift.report.series import LINES, Style
from earlysift.seeds import seeded
from earlysift.theory import bounds, checks, switching
from earlysift.theory.findings import Chart, Finding, Line, Table, log10, measure, trace
from earlysift.theory.linear import direction_correlation, exit_errors, loss_correlation, measure_agreement
from earlysift.theory.problems import (
    Problem,
    bundled,
    objective,
    sample_gradients,
    synthetic,
)
from earlysift.theory.runs import (
    Score,
    additive,
    correlated,
    early_exit,
    exact_loss,
    gradient_norms,
    multiplicative,
    order_kept,
    run,
)

Show = Callable[[float], None]
"""Told the share that is done."""


@dataclass(frozen=True)
class Asked:
    """What all experiments are given.

    Attributes:
        seed: Of all randomness.
        results: Folder of committed results of `earlysift compare`; None draws no workloads into the payoff map.
        effort: Multiplies seeds and instances; 1 is what documents quote, tests take less.
    """

    seed: int = 0
    results: Path | None = None
    effort: float = 1.0

    def count(self, most: int) -> int:
        """A number of seeds or instances at this effort, at least two."""
        return max(2, round(self.effort * most))


UNIFORM, GREEDY, EXACT = (Style(color, strong=True) for color in ("#737b86", "#d9581f", "#2f7fd6"))
BOUND, SHARP = Style("#9166d6", "7 3"), Style("#159a6c", "7 3")
STEPS = Axis("x", "steps")


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
        f"{count} random instances of each statement, {broken} violations. Least squares and logistic regression of random "
        "size, condition, noise and tail; random R, b, eta, d, e and r; errors of a score as bad as they may be, in half of "
        "the instances.",
        [Table("Instances", ("statement", "instances", "violations", "median ratio", "least", "largest"), rows)],
        Chart(
            (measure("measured / bound, upper bounds", bound=1.0), measure("lower bounds and equalities", bound=1.0)),
            Axis("x", "share of the instances, sorted"),
            curves,
            "Measured over bound, cut at 5. Upper bounds (paths, T1, T2, T7 in a run) stay below 1, lower bounds (T3 and T4 pool by "
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

    def train(score: Score = exact_loss) -> checks.Run:
        return run(
            given,
            eta=eta,
            steps=steps,
            seeds=seeds,
            generator=generator,
            pool=pool,
            kept=kept,
            rule="greedy",
            score=score,
        )

    greedy = train()
    u = checks.greedy_minimum(given, pool, kept, steps=200)
    exact = checks.check_run(given, greedy, eta=eta, pool=pool, kept=kept, comparator=u)
    plain = run(given, eta=eta, steps=steps, seeds=seeds, generator=generator)
    uniform = checks.check_run(given, plain, eta=eta)
    d, e, r = real(0, 0.9), real(0, 0.2) * objective(given, given.start).item(), real(-1, 1)
    factor = bounds.multiplicative_gain(1.0, d)
    scaled, shifted = multiplicative(d, worst=worst), additive(e, worst=worst)
    by_scaled, by_shifted = train(scaled), train(shifted)
    rho = checks.gains(given, by_scaled.iterates[:-1], pool, kept)
    rho_shifted = checks.gains(given, by_shifted.iterates[:-1], pool, kept)
    with_d = checks.check_run(given, by_scaled, eta=eta, pool=pool, kept=kept, gain=factor * rho)
    with_e = checks.check_run(given, by_shifted, eta=eta, pool=pool, kept=kept, gain=rho_shifted, lost=2 * e)
    weighted = run(
        given,
        eta=eta,
        steps=steps,
        seeds=seeds,
        generator=generator,
        pool=pool,
        rule="unbiased",
        score=gradient_norms,
    )
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


def greedy(asked: Asked, show: Show) -> Finding:
    """Greedy against uniform SGD: the fast start, and the floor, against T1, T2 and what sharpens them."""
    generator = seeded(asked.seed, "greedy")
    problems = [
        replace(_far(synthetic(generator, noise=0.0), generator), name="least squares, interpolating"),
        replace(_far(synthetic(generator, tail=1.0), generator), name="least squares, one-sided noise"),
        replace(_far(synthetic(generator, kind="logistic"), generator), name="logistic"),
        _far(bundled("diabetes"), generator),
        _far(bundled("breast_cancer"), generator),
    ]
    pool, steps, seeds = 4, 1500, asked.count(12)
    lines: dict[str, dict[int, Line]] = {name: {} for name in ("SGD", "greedy, R = 4", "T2+", "T1+", "unbiased")}
    rows = []
    for m, given in enumerate(problems):
        eta = 0.1 / given.smoothness
        at = list(range(25, steps + 1, 25))
        common = {"eta": eta, "steps": steps, "seeds": seeds, "generator": generator}
        sgd = run(given, **common)
        gsgd = run(given, **common, pool=pool, rule="greedy")
        weighted = run(given, **common, pool=pool, rule="unbiased", score=gradient_norms)
        minimum, top = objective(given, given.optimum).item(), checks.floor(given, pool)
        gain = checks.gains(given, gsgd.iterates[:-1], pool)
        for name, trained in (("SGD", sgd), ("greedy, R = 4", gsgd), ("unbiased", weighted)):
            curve = objective(given, _running_mean(trained.iterates))[[k - 1 for k in at]]
            lines[name][m] = (at, [log10(values) for values in curve.T])
        least = gain.cummin(dim=0).values.amin(dim=1)
        for name, rho, low in (("T2+", torch.ones(steps), minimum), ("T1+", least, top)):
            promised = [
                bounds.sharp_bound(given.distance2, k, eta, given.smoothness, low, rho[k - 1].item()) for k in at
            ]
            lines[name][m] = (at, [log10(torch.tensor(promised).double())])
        half = (objective(given, given.start).item() + minimum) / 2
        to_half = [_steps_to(objective(given, trained.iterates).mean(dim=1), half) for trained in (sgd, gsgd)]
        checked = checks.check_run(given, gsgd, eta=eta, pool=pool, gain=gain)
        plain = checks.check_run(given, sgd, eta=eta)
        rows.append(
            (
                given.name,
                gain.min().item(),
                gain[: to_half[1] or 1].mean().item(),
                None if None in to_half else to_half[0] / max(1, to_half[1] or 1),
                plain["sharp"].measured,
                plain["T1"].bound,
                plain["sharp"].bound,
                plain["sharp"].tightness,
                checked["sharp"].measured,
                checked["T1"].bound,
                checked["sharp"].bound,
                checked["sharp"].tightness,
            )
        )
        show((m + 1) / len(problems))
    headers = ("problem", "least gain", "gain to half-way", "steps saved: SGD's over greedy's, half-way")
    headers += ("SGD, mean iterate", "T2", "T2+", "ratio", "greedy, mean iterate", "T1", "T1+", "ratio ")
    looks = (UNIFORM, GREEDY, Style(UNIFORM.color, "7 3"), Style(GREEDY.color, "7 3"), EXACT)
    faster = [row[3] for row in rows if isinstance(row[3], float)]
    return Finding(
        "greedy",
        "Greedy against uniform: a faster start, and a floor",
        f"Half-way to the minimum, greedy SGD (R = {pool}) needed {min(faster):.2f} to {max(faster):.2f} times fewer steps "
        "than SGD; the gain there was "
        f"{min(row[2] for row in rows):.2f} to {max(row[2] for row in rows):.2f}. Every curve stays below its bound.",
        [Table("Greedy against uniform after the last step", headers, rows)],
        Chart(
            tuple(measure(f"log10 F(mean w), {given.name}") for given in problems),
            STEPS,
            [trace(name, look, lines[name], len(problems)) for name, look in zip(lines, looks, strict=True)],
            f"F at the mean iterate; {seeds} seeds, bands from the lowest to the highest. Dashed: the bounds T1+ (with the "
            "least gain so far) and T2+, proved in docs/theory.md.",
        ),
    )


def floor(asked: Asked, show: Show) -> Finding:
    """The floor of greedy SGD against the size of the pool."""
    generator = seeded(asked.seed, "floor")
    problems = [
        replace(synthetic(generator, width=5, condition=3, tail=0.0), name="Gaussian noise"),
        replace(synthetic(generator, width=5, condition=3, tail=1.0), name="one-sided noise"),
        replace(synthetic(generator, width=5, condition=3, noise=0.3, spike=0.05), name="5 % moved targets"),
    ]
    pools, seeds, steps = (1, 2, 4, 8, 16, 32), asked.count(8), 3000
    lines: dict[str, dict[int, Line]] = {}
    rows = []
    for m, given in enumerate(problems):
        minimum, eta = objective(given, given.optimum).item(), 0.005 / given.smoothness
        found: dict[str, list[list[float]]] = {}
        for i, pool in enumerate(pools):
            for name, kept in (("b = 1", 1), ("b = R / 4", pool // 4)):
                if not kept:
                    continue
                u = checks.greedy_minimum(given, pool, kept)
                # From u, with small steps: where greedy SGD stays.
                at_u = replace(given, start=u)
                trained = run(
                    at_u, eta=eta, steps=steps, seeds=seeds, generator=generator, pool=pool, kept=kept, rule="greedy"
                )
                stays = objective(given, trained.iterates[steps // 2 :].mean(dim=0)) / minimum
                exact = objective(given, u).item() / minimum
                gain = checks.gains(given, u[None, None], pool, kept).item()
                constant = checks.floor(given, pool, kept) / (gain * minimum)
                checked = checks.check_run(at_u, trained, eta=eta, pool=pool, kept=kept, comparator=u)["comparator"]
                found.setdefault(f"measured, {name}", []).append(stays.tolist())
                found.setdefault(f"F at the minimum of G, {name}", []).append([exact])
                found.setdefault(f"M* / (rho F*), {name}", []).append([constant])
                limit, ratio = checked.bound / minimum, checked.tightness
                rows.append((given.name, pool, kept, stays.mean().item(), exact, limit, ratio, constant))
            show((m + (i + 1) / len(pools)) / len(problems))
        for name, values in found.items():
            logs = [math.log2(pool) for pool in pools[-len(values) :]]
            lines.setdefault(name, {})[m] = (logs, list(zip(*values, strict=True)))
    colors = {"b = 1": GREEDY.color, "b = R / 4": EXACT.color}
    looks = [
        Style(colors[name.rpartition(", ")[2]], "" if "measured" in name else "2 3" if "F at" in name else "7 3", True)
        for name in lines
    ]
    worst = max(rows, key=lambda row: row[3])
    return Finding(
        "floor",
        "The floor of greedy selection grows with the pool",
        f"Greedy SGD with small steps stays where G is least, not F: at {worst[3]:.2f} F* on {worst[0]} with R = {worst[1]} "
        "and b = 1. With symmetric noise the floor is small: the hardest samples on both sides balance.",
        [
            Table(
                "Floor over the minimum, F / F*",
                (
                    "noise",
                    "R",
                    "b",
                    "measured",
                    "F(argmin G) / F*",
                    "T1+ from argmin G",
                    "measured / T1+",
                    "M* / (rho F*)",
                ),
                rows,
            )
        ],
        Chart(
            tuple(measure(f"floor / F*, {given.name}", uniform=1.0) for given in problems),
            Axis("x", "log2 of R"),
            [trace(name, look, lines[name], len(problems)) for name, look in zip(lines, looks, strict=True)],
            "Measured: second half of runs that start at the minimum u of G, mean iterate of each of the seeds. Dashed: "
            "the constant of T1 for small steps, with the gain at u.",
        ),
    )


def errors(asked: Asked, show: Show) -> Finding:
    """What errors of the score cost: factors d, distances e, correlations r, exits that see a part."""
    generator = seeded(asked.seed, "errors")
    given = _far(synthetic(generator, samples=500, width=20, condition=10, tail=0.5), generator)
    pool, kept, pools = 8, 1, asked.count(8000)
    path = switching.mean_path(given, eta=0.2 / given.smoothness, steps=400, pool=pool)
    w = path[100]  # on the way: neither the start, where all losses are large, nor the end
    mean_loss = objective(given, w).item()
    rho = checks.gains(given, w[None, None], pool, kept).item()
    points = w.expand(pools, -1)
    shares = [i / 10 for i in range(10)]
    features = list(range(1, 21))
    rs = [i / 5 - 1 for i in range(11)]

    def measured(score: Score, **bound: float) -> tuple[float, float, bool]:
        seen = checks.check_pools(given, points, score, pool, kept, generator, **bound)
        return seen.measured / mean_loss, seen.bound / mean_loss, seen.holds

    exits = [checks.gains(given, w[None, None], pool, kept, early_exit(k)).item() for k in features]
    correlations = [_score_correlation(given, w, early_exit(k)) for k in features]
    lines: dict[str, dict[int, Line]] = {"errors at random": {}, "worst errors": {}, "bound": {}, "T5": {}}
    rows = []
    for m, (kind, amounts, make, limit) in enumerate(
        (
            ("d", shares, multiplicative, lambda d: {"factor": bounds.multiplicative_gain(1.0, d)}),
            (
                "e / F",
                shares,
                lambda e, worst: additive(e * mean_loss, worst=worst),
                lambda e: {"lost": 2 * e * mean_loss},
            ),
        )
    ):
        values = {name: [measured(make(a, worst=worst), **limit(a)) for a in amounts] for name, worst in _KINDS.items()}
        for name, found in values.items():
            lines[name][m] = (amounts, [[gain for gain, _, _ in found]])
        promised = [
            bounds.multiplicative_gain(rho, a)
            if kind == "d"
            else bounds.additive_choice(rho * mean_loss, a * mean_loss) / mean_loss
            for a in amounts
        ]
        lines["bound"][m] = (amounts, [promised])
        for i, amount in enumerate(amounts):
            random, worst = (values[name][i] for name in _KINDS)
            rows.append(
                (kind, amount, random[0], worst[0], promised[i], worst[0] / promised[i] if promised[i] > 0 else None)
            )
        show((m + 1) / 4)
    by_r = [measured(correlated(r))[0] for r in rs]
    lines["errors at random"][2] = (rs, [by_r])
    lines["T5"][2] = (rs, [[costs.approximate_gain(rho, r) for r in rs]])
    said = [costs.approximate_gain(rho, r) for r in rs]
    rows += [("r", r, g, None, t5, g / t5 if t5 > 0 else None) for r, g, t5 in zip(rs, by_r, said, strict=True)]
    lines["errors at random"][3] = (features, [exits])
    lines["T5"][3] = (features, [[costs.approximate_gain(rho, r) for r in correlations]])
    rows += [
        (f"exit, r = {r:.3f}", k, g, None, costs.approximate_gain(rho, r), g / costs.approximate_gain(rho, r))
        for k, r, g in zip(features, correlations, exits, strict=True)
    ]
    same = run(given, eta=1e-3, steps=50, seeds=4, generator=seeded(0), pool=pool, rule="greedy", score=order_kept)
    kept_order = run(given, eta=1e-3, steps=50, seeds=4, generator=seeded(0), pool=pool, rule="greedy")
    show(1.0)
    looks = (GREEDY, Style("#d9581f", "2 3"), BOUND, SHARP)
    backwards = by_r[0]
    return Finding(
        "errors",
        "What errors of the score cost",
        f"With exact losses the gain is {rho:.2f} here (R = {pool}). A score that keeps the order takes the same steps "
        f"({'bit for bit' if torch.equal(same.iterates, kept_order.iterates) else 'NOT the same'}); random errors cost "
        f"far less than the worst ones; a score that ranks backwards (r = -1) has a gain of {backwards:.2f}: worse than uniform.",
        [
            Table(
                "Gain against error",
                ("error", "amount", "gain, random errors", "gain, worst errors", "T3, T4 or T5", "ratio"),
                rows,
            )
        ],
        Chart(
            (
                measure("gain against d (T3)", uniform=1.0),
                measure("gain against e / F (T4)", uniform=1.0),
                measure("gain against r (T5)", uniform=1.0),
                measure("gain of an exit by features seen (T5)", uniform=1.0),
            ),
            Axis("x", "size of the error, correlation, or features that the exit sees"),
            [trace(name, look, lines[name], 4) for name, look in zip(lines, looks, strict=True)],
            "T3 and T4 are lower bounds; T5 is an equality for Gaussian losses, and these are not Gaussian.",
        ),
    )


_KINDS = {"errors at random": False, "worst errors": True}


def crossing(asked: Asked, show: Show) -> Finding:
    """Where greedy becomes worse than uniform, and when to switch it off: predicted and measured."""
    generator = seeded(asked.seed, "crossing")
    problems = [
        replace(
            _far(synthetic(generator, samples=500, width=20, condition=1, tail=1.0), generator),
            name="least squares, condition 1",
        ),
        replace(
            _far(synthetic(generator, samples=500, width=20, condition=3, tail=1.0), generator),
            name="least squares, condition 3",
        ),
        replace(
            _far(synthetic(generator, samples=500, width=20, condition=10, tail=1.0), generator),
            name="least squares, condition 10",
        ),
        replace(
            _far(synthetic(generator, kind="logistic", samples=500, width=20, condition=3), generator),
            name="logistic, condition 3",
        ),
        _far(bundled("wine"), generator),
        _far(bundled("diabetes"), generator),
    ]
    lines: dict[str, dict[int, Line]] = {
        name: {} for name in ("uniform", "greedy", "greedy, best switch", "the controller")
    }
    levels, crossings, switches, ends = [], [], [], []
    for m, given in enumerate(problems):
        minimum = objective(given, given.optimum).item()
        crossings.append((given.name, *_crossing_row(given, asked, generator)))
        show((m + 0.4) / len(problems))
        live = _switching(given, asked)
        best, target, curves = live["best"], live["target"], live["curves"]
        levels.append(math.log10(target - minimum))
        at = list(range(0, len(curves["uniform"]), 10))
        for name, curve in curves.items():
            lines[name][m] = (at, [log10(curve[at] - minimum)])
        switches.append(
            (
                given.name,
                best,
                live["off"],
                live["off"] / best if best else None,
                *live["times"],
                live["plain turn"],
                live["plain best"],
            )
        )
        show((m + 0.8) / len(problems))
        ends.append((given.name, *_ends_row(given, best or 0, asked, generator)))
        show((m + 1) / len(problems))
    near = [row for row in switches if isinstance(row[3], float) and abs(row[3] - 1) <= 0.2]
    met = [row for row in crossings if isinstance(row[4], float)]
    looks = (UNIFORM, GREEDY, EXACT, Style("#159a6c", strong=True))
    return Finding(
        "crossing",
        "Where greedy becomes worse, and when to switch it off",
        f"The mean path predicts the crossing to {max((abs(row[4] - 1) for row in met), default=math.nan):.0%} or better on the {len(met)} "
        f"problems with one. The controller's own estimate switches off within 20 % of the best time on {len(near)} of "
        f"{len(problems)} problems ({', '.join(str(row[0]) for row in near)}).",
        [
            Table(
                "Crossing of greedy (R = 4, b = 1) and uniform SGD, in steps",
                ("problem", "where T1 = T2", "mean path", "measured", "mean path / measured"),
                crossings,
            ),
            Table(
                "Switch-off time, in steps: best measured, and found live by the controller (R = 64, b = 16, unit steps)",
                (
                    "problem",
                    "best",
                    "controller",
                    "controller / best",
                    "to target: best",
                    "controller ",
                    "uniform",
                    "greedy",
                    "plain SGD: T8 on the mean path",
                    "plain SGD: best",
                ),
                switches,
            ),
            Table(
                "Where each ends, F - F*: annealing keeps no floor",
                ("problem", "uniform", "greedy", "greedy, then uniform", "its bound T9", "unbiased", "its bound T7+"),
                ends,
            ),
        ],
        Chart(
            tuple(
                measure(f"log10 (F - F*), {given.name}", target=level)
                for given, level in zip(problems, levels, strict=True)
            ),
            STEPS,
            [trace(name, look, lines[name], len(problems)) for name, look in zip(lines, looks, strict=True)],
            "Training by steps of one length, R = 64, b = 16, means over seeds. The target lies half-way (in logarithms) "
            "between where greedy and where uniform stay; the best switch-off time reaches it first.",
        ),
    )


def _crossing_row(given: Problem, asked: Asked, generator: Generator) -> tuple[float | int | None, ...]:
    pool, steps, eta = 4, 5000, 0.1 / given.smoothness
    common = {"eta": eta, "steps": steps}
    path, plain = (switching.mean_path(given, **common, pool=pool, until=until) for until in (None, 0))
    predicted = switching.crossing(objective(given, path), objective(given, plain))
    curves = []
    for size, rule in ((pool, "greedy"), (1, "uniform")):
        trained = run(given, **common, seeds=asked.count(32), generator=generator, pool=size, rule=rule)
        curves.append(switching.smoothed(objective(given, trained.iterates).mean(dim=1)))
    seen = switching.crossing(*curves)
    least = checks.gains(given, path[:, None], pool).min().item()
    minimum = objective(given, given.optimum).item()
    guaranteed = bounds.crossing_step(given.distance2, eta, least, checks.floor(given, pool), minimum)
    return guaranteed, predicted, seen, predicted / seen if predicted and seen else None


def _switching(given: Problem, asked: Asked) -> dict[str, object]:
    """The best switch-off time for unit steps and for plain SGD, and what finds it."""
    pool, kept, steps, seeds = 64, 16, 800, asked.count(16)
    length = math.sqrt(given.distance2) / 250
    common = {"pool": pool, "kept": kept}
    swept = switching.switched_runs(
        given, length=length, steps=steps, **common, until=list(range(0, steps + 1, 20)), seeds=seeds, seed=asked.seed
    )
    target = switching.target_between(swept, given)
    best, times = switching.best_switch(swept, target)
    lived = [
        switching.live_switch(given, length=length, steps=steps, **common, every=10, seed=asked.seed + 1 + i)
        for i in range(asked.count(11))
    ]
    off = median([steps if each is None else each for each, _ in lived])
    curve = torch.stack([curve for _, curve in lived]).mean(dim=0)
    nearest = min(range(len(swept.until)), key=lambda i: abs(swept.until[i] - (best or 0)))
    eta, longer, small = 0.4 / given.smoothness, 1000, {"pool": 16, "kept": 4}
    plain = switching.switched_runs(
        given,
        length=eta,
        steps=longer,
        **small,
        until=list(range(0, longer + 1, 40)),
        seeds=asked.count(8),
        seed=asked.seed,
        unit=False,
    )
    path = switching.mean_path(given, eta=eta, steps=longer, **small)
    reached = [time for time in times if time is not None]
    return {
        "best": best,
        "target": target,
        "off": off,
        "times": (min(reached, default=None), _steps_to(curve, target), times[0], times[-1]),
        "plain turn": switching.turning_point(given, path, **small),
        "plain best": switching.best_switch(plain, switching.target_between(plain, given))[0],
        "curves": {
            "uniform": swept.objective[:, 0],
            "greedy": swept.objective[:, -1],
            "greedy, best switch": swept.objective[:, nearest],
            "the controller": curve,
        },
    }


def _ends_row(given: Problem, switch: int, asked: Asked, generator: Generator) -> tuple[float, ...]:
    pool, steps, eta = 4, 2000, 0.1 / given.smoothness
    minimum = objective(given, given.optimum).item()
    common = {"eta": eta, "steps": steps, "seeds": asked.count(16), "generator": generator}

    def end(iterates: Tensor) -> float:
        return objective(given, iterates[steps // 2 : -1].mean(dim=0)).mean().item() - minimum

    annealed = run(given, **common, pool=pool, rule="greedy", schedule=lambda step: float(step < steps // 2))
    half = annealed.iterates[steps // 2]
    everyone = torch.arange(len(given.targets)).unsqueeze(0)
    noise = sample_gradients(given, given.optimum.unsqueeze(0), everyone).square().sum(dim=-1).mean().item()
    distance2 = (half - given.optimum).square().sum(dim=1).mean().item()
    promised = bounds.annealed_bound(distance2, steps - steps // 2, eta, given.smoothness, minimum, noise) - minimum
    weighted = run(given, **common, pool=pool, rule="unbiased", score=gradient_norms)
    return (
        end(run(given, **common).iterates),
        end(run(given, **common, pool=pool, rule="greedy").iterates),
        end(annealed.iterates),
        promised,
        end(weighted.iterates),
        checks.check_unbiased_run(given, weighted, eta=eta, pool=pool).bound - minimum,
    )


def linear(asked: Asked, show: Show) -> Finding:
    """Deep linear networks: how often an exit keeps the true argmax and the kept set."""
    depth, width, networks, pools = 8, 32, asked.count(6), asked.count(2000)
    sizes, spreads = (2, 8, 32), (0.05, 0.2, 0.5)
    lines: dict[str, dict[int, Line]] = {}
    rows, broken, checked = [], 0, 0
    total = len(sizes) * len(spreads) * 2
    for m, pool in enumerate(sizes):
        for s, spread in enumerate(spreads):
            for o, outputs in enumerate((1, 16)):
                seen: list[list[float]] = []
                said: list[list[float]] = []
                overlaps, kept_said = [], []
                for n in range(networks):
                    generator = seeded(asked.seed, "linear", spread, outputs, n)
                    maps = exit_errors(generator, depth=depth, width=width, spread=spread, outputs=outputs)
                    found = [measure_agreement(at, maps[-1], pool, pool // 2, pools, generator) for at in maps[1:-1]]
                    if outputs == 1:
                        predicted = [
                            bounds.agreement_of_squares(direction_correlation(at, maps[-1]), pool) for at in maps[1:-1]
                        ]
                        hits = [
                            checks.equal(each.argmax, p, each.argmax_error, slack=2e-4)
                            for each, p in zip(found, predicted, strict=True)
                        ]
                        broken, checked = broken + sum(not hit.holds for hit in hits), checked + len(hits)
                    else:
                        rs = [loss_correlation(at, maps[-1]) for at in maps[1:-1]]
                        predicted = [bounds.agreement(r, pool) for r in rs]
                        kept_said.append([bounds.kept_overlap(r, 0.5) for r in rs])
                    seen.append([each.argmax for each in found])
                    said.append(predicted)
                    overlaps.append([each.overlap for each in found])
                depths = list(range(1, depth))
                mean_seen, mean_said, mean_overlap = (
                    torch.tensor(x).double().mean(dim=0) for x in (seen, said, overlaps)
                )
                error = torch.tensor(seen).double().std(dim=0) / math.sqrt(networks)
                name = f"spread {spread:g}, {outputs} output{'s' * (outputs > 1)}"
                lines.setdefault(name, {})[m] = (
                    depths,
                    [(mean_seen - 1.96 * error).tolist(), (mean_seen + 1.96 * error).tolist()],
                )
                lines.setdefault(f"{name}: {'T6 of squares' if outputs == 1 else 'T6'}", {})[m] = (
                    depths,
                    [mean_said.tolist()],
                )
                for k in (1, 4, 7):
                    i = k - 1
                    rows.append(
                        (
                            pool,
                            spread,
                            outputs,
                            k,
                            mean_seen[i].item(),
                            1.96 * error[i].item(),
                            mean_said[i].item(),
                            mean_seen[i].item() / mean_said[i].item(),
                            mean_overlap[i].item(),
                            torch.tensor(kept_said).double().mean(dim=0)[i].item() if kept_said else None,
                        )
                    )
                show((2 * (m * len(spreads) + s) + o + 1) / total)
    colors = ("#2f7fd6", "#d9581f", "#159a6c", "#9166d6", "#a9713a", "#1493a3")
    looks = [Style(colors[i // 2], "7 3" if i % 2 else "", strong=True) for i in range(len(lines))]
    ratios = [abs(row[7] - 1) for row in rows if row[2] == 16]
    return Finding(
        "linear",
        "Linear networks: does an early exit keep the hardest sample?",
        f"With one output the closed form is exact: {broken} of {checked} exits (network by network) outside five standard "
        f"errors. With 16 outputs losses are near Gaussian, and T6 with the loss correlation is off by {max(ratios):.0%} at most.",
        [
            Table(
                f"P(argmax kept) and overlap of the kept half, {depth} layers of width {width}, mean over {networks} networks",
                (
                    "R",
                    "spread",
                    "outputs",
                    "exit",
                    "argmax kept",
                    "± 95 %",
                    "predicted",
                    "ratio",
                    "overlap",
                    "predicted for R → ∞",
                ),
                rows,
            )
        ],
        Chart(
            tuple(measure(f"P(exit keeps the argmax), R = {pool}", random=1 / pool) for pool in sizes),
            Axis("x", f"exit (layers that run, of {depth})"),
            [
                trace(name, look, lines[name], len(sizes), shown="0.2" in name)
                for name, look in zip(lines, looks, strict=True)
            ],
            "Bands: 95 % intervals of the mean over random networks. Dashed: in closed form from the networks' matrices.",
        ),
    )


def payoff(asked: Asked, show: Show) -> Finding:
    """The gain that pays, by fidelity, keep and depth, and where measured workloads lie."""
    layers, head, forward = 12, 0.04, 1 / 3  # a 12-layer encoder, its head a 25th of the forward pass
    keeps, depths = (0.5, 0.25, 0.125), (1, 2, 3, 6)
    rs = [i / 20 for i in range(2, 21)]
    lines: dict[str, dict[int, Line]] = {}
    rows = []
    for m, keep in enumerate(keeps):
        for depth in depths:
            cost = costs.relative_cost(forward, head + (1 - head) * depth / layers, keep)
            # The exact gain whose share that fidelity leaves (T5) just pays for scoring (C2).
            needed = [1 + (costs.break_even_gain(cost) - 1) / r for r in rs]
            lines.setdefault(f"break-even, exit {depth}", {})[m] = (rs, [needed])
            rows.append((keep, depth, cost, *(1 + (cost - 1) / r for r in (0.5, 0.9, 1.0))))
    looks = [Style(style.color, "7 3", strong=True) for style in LINES[: len(lines)]]
    workloads = _workloads(asked.results) if asked.results else []
    traces = [trace(name, look, lines[name], len(keeps)) for name, look in zip(lines, looks, strict=True)]
    for workload, style in zip(workloads, (LINES[4:] + LINES) * 3, strict=False):
        name, r, exact = str(workload[0]), workload[2], workload[4]
        if isinstance(r, float) and isinstance(exact, float):
            traces.append(trace(name, style, {0: ([r], [[exact]])}, len(keeps)))
    show(0.3)
    toll = _interpolating(asked)
    show(1.0)
    beyond = sum(1 for each in workloads if isinstance(each[6], float) and each[6] > 1)
    won = sum(1 for each in workloads if isinstance(each[7], float) and each[7] > 1)
    return Finding(
        "payoff",
        "When it pays",
        f"Where every sample can be fitted, the steps saved are the gain: measured over predicted {min(row[4] for row in toll):.2f} "
        f"to {max(row[4] for row in toll):.2f} (mean gain along the run). On deep networks they are not: of {len(workloads)} "
        f"measured arms {beyond} had a payoff above 1 by C2, and {won} reached the target sooner than uniform training.",
        [
            Table(
                "Break-even gain (12 layers, labelled-tokens-only head)",
                ("keep", "exit", "cost c (C1)", "r = 0.5", "r = 0.9", "r = 1"),
                rows,
            ),
            Table(
                "Payoff where T1 has no floor: steps of SGD over steps of greedy to 1 % of the start, least squares",
                ("R", "mean gain along the run", "steps saved, measured", "least gain", "measured / predicted"),
                toll,
            ),
            Table(
                "Measured workloads (docs/results.md): second half of training, keep 0.5",
                (
                    "workload",
                    "seeds",
                    "rank correlation",
                    "gain rho_r",
                    "gain of exact losses by T5",
                    "cost c",
                    "payoff C2",
                    "speed-up measured",
                ),
                workloads,
            ),
        ],
        Chart(
            tuple(measure(f"gain of exact losses, keep {keep:g}", uniform=1.0) for keep in keeps),
            Axis("x", "fidelity (rank correlation r)"),
            traces,
            "Above a dashed line selection pays by C2 at that exit; dots are measured workloads (keep 0.5, exit 1), their gain "
            "put back to exact losses by T5.",
        ),
    )


def _workloads(folder: Path) -> list[tuple[str | int | float | None, ...]]:
    """The arms that select by an exit of the committed results, or those in a folder."""
    rows: list[tuple[str | int | float | None, ...]] = []
    for path in sorted(folder.glob("compare_*.json")):
        results = json.loads(path.read_text(encoding="utf-8"))
        prices = {name: timing["median"] for name, timing in results["operations_ms"].items()}
        for name, scored in (("sift", "score_1"), ("sift-entropy", "entropy_1")):
            if name not in results["arms"] or scored not in prices:
                continue
            seeds = [each for each in results["arms"][name]["runs"] if each["finished"]]
            late = [point for each in seeds for point in each["fidelity"][len(each["fidelity"]) // 2 :]]
            if not late:
                continue
            r, gain = (sum(point[key] for point in late) / len(late) for key in ("rank_correlation", "gain"))
            cost = 1 + prices[scored] / prices["train"]
            label = (
                f"{results['data']['name']}, {results['arms'][name]['label']} ({path.stem.removeprefix('compare_')})"
            )
            exact = 1 + (gain - 1) / r if r > 0.1 else None
            speedup = results["comparison"].get(name, {}).get("speedup")
            rows.append((label, len(seeds), r, gain, exact, cost, costs.payoff(gain, cost), speedup))
    return rows


def _interpolating(asked: Asked) -> list[tuple[float, ...]]:
    """Steps saved by greedy SGD where all samples can be fitted, against the gain."""
    generator = seeded(asked.seed, "payoff")
    given = _far(synthetic(generator, samples=500, width=20, condition=1, noise=0.0), generator)
    eta, seeds = 0.1 / given.smoothness, asked.count(16)
    goal = 0.01 * objective(given, given.start).item()
    steps = 3000
    plain = _steps_to(
        objective(given, run(given, eta=eta, steps=steps, seeds=seeds, generator=generator).iterates).mean(dim=1), goal
    )
    rows = []
    for pool in (2, 4, 8, 16):
        trained = run(given, eta=eta, steps=steps, seeds=seeds, generator=generator, pool=pool, rule="greedy")
        took = _steps_to(objective(given, trained.iterates).mean(dim=1), goal)
        if plain is None or took is None:
            continue
        rho = checks.gains(given, trained.iterates[:took], pool)
        rows.append((pool, rho.mean().item(), plain / took, rho.min().item(), plain / took / rho.mean().item()))
    return rows


EXPERIMENTS: dict[str, Callable[[Asked, Show], Finding]] = {
    "statements": statements,
    "greedy": greedy,
    "floor": floor,
    "errors": errors,
    "crossing": crossing,
    "linear": linear,
    "payoff": payoff,
}


def run_experiments(
    names: Sequence[str],
    show: Callable[[str, float], None],
    *,
    seed: int = 0,
    results: Path | None = None,
    effort: float = 1.0,
) -> list[Finding]:
    """Run experiments, one after the other, on one thread, so that sums are the same to the last digit.

    Args:
        names: Of `EXPERIMENTS`; all if empty.
        show: Told an experiment and the share of it that is done.
        seed: Of all randomness.
        results: Folder with ``compare_*.json`` for the payoff map.
        effort: Multiplies seeds and instances.

    Raises:
        ValueError: If a name is unknown, or the folder holds no results.
    """
    unknown = [name for name in names if name not in EXPERIMENTS]
    if unknown:
        raise ValueError(f"Expected experiments among {', '.join(EXPERIMENTS)}, got {', '.join(unknown)}.")
    if results is not None and not any(results.glob("compare_*.json")):
        raise ValueError(
            f"Expected compare_*.json in {results}, found none; give the folder of a comparison's results."
        )
    asked = Asked(seed, results, effort)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [
            experiment(asked, lambda share, name=name: show(name, share))  # type: ignore[misc]
            for name, experiment in EXPERIMENTS.items()
            if name in (names or EXPERIMENTS)
        ]
    finally:
        torch.set_num_threads(threads)


def _far(given: Problem, generator: Generator, distance: float = 5.0) -> Problem:
    """The same problem, started at a distance from its minimum."""
    direction = torch.randn(given.start.shape, generator=generator, dtype=torch.float64)
    return replace(given, start=given.optimum + distance * direction / direction.norm())


def _running_mean(iterates: Tensor) -> Tensor:
    """Mean of w_0 ... w_{k-1} for k = 1 ... K, ``(K, S, d)``."""
    counts = torch.arange(1, len(iterates), dtype=torch.float64)[:, None, None]
    return iterates[:-1].cumsum(dim=0) / counts


def _steps_to(curve: Tensor, goal: float) -> int | None:
    where = (curve <= goal).nonzero()
    return int(where[0]) if len(where) else None


def _score_correlation(given: Problem, w: Tensor, score: Score) -> float:
    """Correlation of a score with the exact loss over all samples at a point."""
    losses = checks.sample_losses(given, w.unsqueeze(0))
    everyone = torch.arange(len(given.targets)).unsqueeze(0)
    scores = score(checks.Candidates(given, w.unsqueeze(0), everyone, losses, Generator()))
    return torch.corrcoef(torch.cat([scores, losses]))[0, 1].item()

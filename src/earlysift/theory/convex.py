"""Greedy SGD on convex problems: the fast start, the floor, and what errors of the score cost."""

import math
from dataclasses import replace
from functools import partial

import torch
from torch import Generator, Tensor

from earlysift import costs
from earlysift.report.chart import Axis
from earlysift.report.series import Style
from earlysift.seeds import seeded
from earlysift.theory import bounds, checks, switching
from earlysift.theory.asked import BOUND, EXACT, GREEDY, SHARP, STEPS, UNIFORM, Asked, Show, far, steps_to
from earlysift.theory.findings import Cell, Chart, Finding, Line, Table, log10, measure, trace
from earlysift.theory.problems import Problem, bundled, objective, sample_losses, synthetic
from earlysift.theory.runs import (
    Candidates,
    Score,
    additive,
    correlated,
    early_exit,
    gradient_norms,
    multiplicative,
    order_kept,
    run,
)


def greedy(asked: Asked, show: Show) -> Finding:
    """Greedy against uniform SGD: the fast start, and the floor, against T1, T2 and what sharpens them."""
    generator = seeded(asked.seed, "greedy")
    problems = [
        replace(far(synthetic(generator, noise=0.0), generator), name="least squares, interpolating"),
        replace(far(synthetic(generator, tail=1.0), generator), name="least squares, one-sided noise"),
        replace(far(synthetic(generator, kind="logistic"), generator), name="logistic"),
        far(bundled("diabetes"), generator),
        far(bundled("breast_cancer"), generator),
    ]
    pool, steps, seeds = 4, 1500, asked.count(12)
    lines: dict[str, dict[int, Line]] = {name: {} for name in ("SGD", "greedy, R = 4", "T2+", "T1+", "unbiased")}
    rows: list[tuple[Cell, ...]] = []
    held: list[tuple[Cell, ...]] = []
    for m, given in enumerate(problems):
        eta = 0.1 / given.smoothness
        at = list(range(25, steps + 1, 25))
        train = partial(run, given, eta=eta, steps=steps, seeds=seeds, generator=generator)
        sgd, gsgd = train(), train(pool=pool, rule="greedy")
        weighted = train(pool=pool, rule="unbiased", score=gradient_norms)
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
            lines[name][m] = (at, [log10(torch.tensor(promised, dtype=torch.float64))])
        half = (objective(given, given.start).item() + minimum) / 2
        to_half = [steps_to(objective(given, trained.iterates).mean(dim=1), half) for trained in (sgd, gsgd)]
        checked = checks.check_run(given, gsgd, eta=eta, pool=pool, gain=gain)
        plain = checks.check_run(given, sgd, eta=eta)
        start = (gain.min().item(), gain[: to_half[1] or 1].mean().item())
        rows.append((given.name, *start, *to_half, _ratio(*to_half)))
        for name, found in (("SGD", plain), ("greedy", checked)):
            sharp = found["sharp"]
            held.append((given.name, name, sharp.measured, found["T1"].bound, sharp.bound, sharp.tightness))
        show((m + 1) / len(problems))
    headers = ("problem", "least gain", "gain to half-way", "steps to half-way, SGD", "greedy", "SGD / greedy")
    looks = (UNIFORM, GREEDY, Style(UNIFORM.color, "7 3"), Style(GREEDY.color, "7 3"), EXACT)
    faster = [row[5] for row in rows if isinstance(row[5], float)]
    early = [row[2] for row in rows if isinstance(row[2], float)]
    return Finding(
        "greedy",
        "Greedy against uniform: a faster start, and a floor",
        f"Half-way to the minimum, greedy SGD (R = {pool}) needed {min(faster):.2f} to "
        f"{max(faster):.2f} times fewer steps "
        "than SGD; the gain there was "
        f"{min(early):.2f} to {max(early):.2f}. Every curve stays below its bound.",
        [
            Table("Steps half-way to the minimum", headers, rows),
            Table(
                f"Mean iterate after {steps} steps against the bounds",
                ("problem", "", "F(mean w)", "T1, T2", "T1+, T2+", "measured / T1+, T2+"),
                held,
            ),
        ],
        Chart(
            tuple(measure(f"log10 F(mean w), {given.name}") for given in problems),
            STEPS,
            [trace(name, look, lines[name], len(problems)) for name, look in zip(lines, looks, strict=True)],
            f"F at the mean iterate; {seeds} seeds, bands from the lowest to the highest. Dashed: the "
            f"bounds T1+ (with the "
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
            for name, kept in (("b = 1", 1), ("b = R / 4", pool // 4 if pool > 4 else 0)):
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
        f"Greedy SGD with small steps stays where G is least, not F: at {worst[3]:.2f} F* on "
        f"{worst[0]} with R = {worst[1]} "
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
            "Measured: second half of runs that start at the minimum u of G, mean iterate of each of "
            "the seeds. Dashed: "
            "the constant of T1 for small steps, with the gain at u.",
        ),
    )


def errors(asked: Asked, show: Show) -> Finding:
    """What errors of the score cost: factors d, distances e, correlations r, exits that see a part."""
    generator = seeded(asked.seed, "errors")
    given = far(synthetic(generator, samples=500, width=20, condition=10, tail=0.5), generator)
    pool, kept, pools = 8, 1, asked.count(8000)
    path = switching.mean_path(given, eta=0.2 / given.smoothness, steps=400, pool=pool)
    w = path[100]  # on the way: neither the start, where all losses are large, nor the end
    mean_loss = objective(given, w).item()
    rho = checks.gains(given, w[None, None], pool, kept).item()
    points = w.expand(pools, -1)
    shares = [i / 10 for i in range(10)]
    features = list(range(1, 21))
    rs = [i / 5 - 1 for i in range(11)]

    def measured(score: Score, **bound: float) -> tuple[float, float]:
        seen = checks.check_pools(given, points, score, pool, kept, generator, **bound)
        return seen.measured / mean_loss, seen.bound / mean_loss

    exits = [checks.gains(given, w[None, None], pool, kept, early_exit(k)).item() for k in features]
    correlations = [_score_correlation(given, w, early_exit(k)) for k in features]
    lines: dict[str, dict[int, Line]] = {"errors at random": {}, "worst errors": {}, "bound": {}, "T5": {}}
    rows: list[tuple[Cell, ...]] = []
    for m, kind in enumerate(("d", "e / F")):
        values: dict[str, list[tuple[float, float]]] = {}
        for name, worst in _KINDS.items():
            for share in shares:
                if kind == "d":
                    limit = {"factor": bounds.multiplicative_gain(1.0, share)}
                    found = measured(multiplicative(share, worst=worst), **limit)
                else:
                    e = share * mean_loss
                    found = measured(additive(e, worst=worst), lost=2 * e)
                values.setdefault(name, []).append(found)
        promised = [
            bounds.multiplicative_gain(rho, share) if kind == "d" else bounds.additive_choice(rho, share)
            for share in shares
        ]
        for name, pairs in values.items():
            lines[name][m] = (shares, [[gain for gain, _ in pairs]])
        lines["bound"][m] = (shares, [promised])
        for i, share in enumerate(shares):
            random, (worst_gain, least) = (values[name][i] for name in _KINDS)
            ratio = worst_gain / least if least > 0 else None
            rows.append((kind, share, random[0], worst_gain, promised[i], ratio))
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
        f"far less than the worst ones; a score that ranks backwards (r = -1) has a gain of "
        f"{backwards:.2f}: worse than uniform.",
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


def _ratio(above: int | None, below: int | None) -> float | None:
    return above / below if above and below else None


def _running_mean(iterates: Tensor) -> Tensor:
    """Mean of w_0 ... w_{k-1} for k = 1 ... K, ``(K, S, d)``."""
    counts = torch.arange(1, len(iterates), dtype=torch.float64)[:, None, None]
    return iterates[:-1].cumsum(dim=0) / counts


def _score_correlation(given: Problem, w: Tensor, score: Score) -> float:
    """Correlation of a score with the exact loss over all samples at a point."""
    losses = sample_losses(given, w.unsqueeze(0))
    everyone = torch.arange(len(given.targets)).unsqueeze(0)
    scores = score(Candidates(given, w.unsqueeze(0), everyone, losses, Generator()))
    return torch.corrcoef(torch.cat([scores, losses]))[0, 1].item()

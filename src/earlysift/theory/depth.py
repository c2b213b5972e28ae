"""Networks: does an early exit keep the hardest sample, and where does selection pay."""

import math
from pathlib import Path

import torch

from earlysift import costs
from earlysift.report.chart import Axis
from earlysift.report.series import LINES, Style, items, label, mean, number, section, sections
from earlysift.seeds import seeded
from earlysift.theory import bounds, checks
from earlysift.theory.asked import Asked, Show, far, steps_to
from earlysift.theory.experiments import measured
from earlysift.theory.findings import Chart, Finding, Line, Table, measure, trace
from earlysift.theory.linear import direction_correlation, exit_errors, loss_correlation, measure_agreement
from earlysift.theory.problems import objective, synthetic
from earlysift.theory.runs import (
    run,
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
                    generator = seeded(asked.seed, "linear", str(spread), outputs, n)
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
                    torch.tensor(x, dtype=torch.float64).mean(dim=0) for x in (seen, said, overlaps)
                )
                error = torch.tensor(seen, dtype=torch.float64).std(dim=0) / math.sqrt(networks)
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
                            torch.tensor(kept_said, dtype=torch.float64).mean(dim=0)[i].item() if kept_said else None,
                        )
                    )
                show((2 * (m * len(spreads) + s) + o + 1) / total)
    colors = ("#2f7fd6", "#d9581f", "#159a6c", "#9166d6", "#a9713a", "#1493a3")
    looks = [Style(colors[i // 2], "7 3" if i % 2 else "", strong=True) for i in range(len(lines))]
    ratios = [abs(row[7] - 1) for row in rows if row[2] == 16]
    return Finding(
        "linear",
        "Linear networks: does an early exit keep the hardest sample?",
        f"With one output the closed form is exact: {broken} of {checked} exits (network by network) "
        f"outside five standard "
        f"errors. With 16 outputs losses are near Gaussian, and T6 with the loss correlation is off by "
        f"{max(ratios):.0%} at most.",
        [
            Table(
                f"P(argmax kept) and overlap of the kept half, {depth} layers of width {width}, mean "
                f"over {networks} networks",
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
            "Bands: 95 % intervals of the mean over random networks. Dashed: in closed form from the "
            "networks' matrices.",
        ),
    )


def payoff(asked: Asked, show: Show) -> Finding:
    """The gain that pays, by fidelity, keep and depth, and where measured workloads lie."""
    layers, head, forward = 12, 0.04, 1 / 3  # a 12-layer encoder, its head a 25th of the forward pass
    keeps, depths = (0.5, 0.25, 0.125), (1, 2, 3, 6)
    rs = [i / 20 for i in range(6, 21)]
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
        f"Where every sample can be fitted, the steps saved are the gain: measured over predicted "
        f"{min(row[4] for row in toll):.2f} "
        f"to {max(row[4] for row in toll):.2f} (mean gain along the run). On deep networks they are "
        f"not: of {len(workloads)} "
        f"measured arms {beyond} had a payoff above 1 by C2, and {won} reached the target sooner than "
        f"uniform training.",
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
            "Above a dashed line selection pays by C2 at that exit; dots are measured workloads (keep "
            "0.5, exit 1), their gain "
            "put back to exact losses by T5. Lines count FLOPs of 12 layers; the table has each "
            "workload's measured cost.",
        ),
    )


def _workloads(folder: Path) -> list[tuple[str | int | float | None, ...]]:
    """The arms that select by an exit of the committed results, or those in a folder."""
    rows: list[tuple[str | int | float | None, ...]] = []
    for workload, results in measured(folder).items():
        prices = {
            name: number(timing.get("median")) or 0.0 for name, timing in sections(results, "operations_ms").items()
        }
        for name, scored in (("sift", "score_1"), ("sift-entropy", "entropy_1")):
            arm, score = section(sections(results, "arms"), name), prices.get(scored)
            if not arm or not score:
                continue
            finished = [items(each, "fidelity") for each in items(arm, "runs") if each.get("finished")]
            late = [point for points in finished for point in points[len(points) // 2 :]]
            r, gain = (mean(point.get(key) for point in late) for key in ("rank_correlation", "gain"))
            if r is None or gain is None:
                continue
            cost = 1 + score / prices["train"]
            exact = 1 + (gain - 1) / r if r > 0.1 else None
            speedup = section(section(results, "comparison"), name).get("speedup")
            title = f"{workload}: {label(name, arm)}"
            rows.append((title, len(finished), r, gain, exact, cost, costs.payoff(gain, cost), speedup))
    return rows


def _interpolating(asked: Asked) -> list[tuple[float, ...]]:
    """Steps saved by greedy SGD where all samples can be fitted, against the gain."""
    generator = seeded(asked.seed, "payoff")
    given = far(synthetic(generator, samples=500, width=20, condition=1, noise=0.0), generator)
    eta, seeds = 0.1 / given.smoothness, asked.count(16)
    goal = 0.01 * objective(given, given.start).item()
    steps = 3000
    plain = steps_to(
        objective(given, run(given, eta=eta, steps=steps, seeds=seeds, generator=generator).iterates).mean(dim=1), goal
    )
    rows: list[tuple[float, ...]] = []
    for pool in (2, 4, 8, 16):
        trained = run(given, eta=eta, steps=steps, seeds=seeds, generator=generator, pool=pool, rule="greedy")
        took = steps_to(objective(given, trained.iterates).mean(dim=1), goal)
        if plain is None or took is None:
            continue
        rho = checks.gains(given, trained.iterates[:took], pool)
        rows.append((pool, rho.mean().item(), plain / took, rho.min().item(), plain / took / rho.mean().item()))
    return rows

"""Where selection pays: the gain that breaks even, and where measured workloads lie."""

from collections import defaultdict
from functools import partial
from pathlib import Path

from earlysift import costs
from earlysift.report.series import LINES, Style, items, label, mean, number, section, sections
from earlysift.seeds import seeded
from earlysift.theory import checks
from earlysift.theory.crossing import first
from earlysift.theory.experiments import read_workloads
from earlysift.theory.findings import Finding, Lines, Options, Row, Show, Table
from earlysift.theory.problems import synthetic
from earlysift.theory.runs import run


def payoff(options: Options, show: Show) -> Finding:
    """The gain that pays, by fidelity, keep and depth, and where measured workloads lie."""
    layers, head, forward = 12, 0.04, 1 / 3  # a 12-layer encoder, its head a 25th of the forward pass
    keeps = (0.5, 0.25, 0.125)
    rs = [i / 20 for i in range(6, 21)]
    lines: Lines = defaultdict(dict)
    rows = []
    for m, keep in enumerate(keeps):
        for depth in (1, 2, 3, 6):
            cost = costs.relative_cost(forward, head + (1 - head) * depth / layers, keep)
            # The exact gain of which fidelity r leaves (T5) just enough to pay for scoring (C2).
            needed = {r: 1 + (costs.break_even_gain(cost) - 1) / r for r in rs}
            lines[f"break-even, exit {depth}"][m] = (rs, [list(needed.values())])
            rows.append((keep, depth, cost, *(needed[r] for r in (0.5, 0.9, 1.0))))
    styles = [Style(style.color, "7 3", strong=True) for style in LINES[: len(lines)]]
    workloads = _workloads(options.results) if options.results else []
    for (name, _, r, _, exact, *_), style in zip(workloads, (LINES[4:] + LINES) * 3, strict=False):
        if isinstance(r, float) and isinstance(exact, float):
            lines[str(name)] = {0: ([r], [[exact]])}
            styles.append(style)
    show(0.3)
    savings = _interpolating(options)
    show(1.0)
    ratios = [row[4] for row in savings]
    above, sooner = (sum(1 for row in workloads if isinstance(x := row[i], float) and x > 1) for i in (6, 7))
    return Finding(
        "payoff",
        "When it pays",
        f"Where every sample can be fitted, the steps saved are the gain: measured over predicted {min(ratios):.2f} to "
        f"{max(ratios):.2f} (mean gain along the run). On deep networks they are not: of {len(workloads)} measured "
        f"arms {above} had a payoff above 1 by C2, and {sooner} reached the target sooner than uniform training.",
        [
            Table(
                "Break-even gain (12 layers, labelled-tokens-only head)",
                ("keep", "exit", "cost c (C1)", "r = 0.5", "r = 0.9", "r = 1"),
                rows,
            ),
            Table(
                "Payoff where T1 has no floor: steps of SGD over steps of greedy to 1 % of the start, least squares",
                ("R", "mean gain along the run", "steps saved, measured", "least gain", "measured / predicted"),
                savings,
            ),
            Table(
                "Measured workloads (docs/results.md): second half of training, keep 0.5",
                (
                    *("workload", "seeds", "rank correlation", "gain rho_r"),
                    *("gain of exact losses by T5", "cost c", "payoff C2", "speed-up measured"),
                ),
                workloads,
            ),
        ],
        levels={f"gain of exact losses, keep {keep:g}": {"uniform": 1.0} for keep in keeps},
        axis_label="fidelity (rank correlation r)",
        lines=lines,
        styles=styles,
        note="Above a dashed line selection pays by C2 at that exit; dots are measured workloads (keep 0.5, exit 1), "
        "their gain put back to exact losses by T5. Lines count FLOPs of 12 layers; the table has each workload's "
        "measured cost.",
    )


def _workloads(folder: Path) -> list[Row]:
    """The arms that select by an exit, in the results of a folder."""
    rows: list[Row] = []
    for workload, results in read_workloads(folder).items():
        timings = sections(results, "operations_ms").items()
        prices_ms = {name: number(timing.get("median")) or 0.0 for name, timing in timings}
        for name, operation in (("sift", "score_1"), ("sift-entropy", "entropy_1")):
            arm, score_ms = section(sections(results, "arms"), name), prices_ms.get(operation)
            finished = [items(each, "fidelity") for each in items(arm, "runs") if each.get("finished")]
            late = [point for points in finished for point in points[len(points) // 2 :]]
            r, gain = (mean(point.get(key) for point in late) for key in ("rank_correlation", "gain"))
            if not score_ms or r is None or gain is None:
                continue
            cost = 1 + score_ms / prices_ms["train"]
            exact = 1 + (gain - 1) / r if r > 0.1 else None
            speedup = section(section(results, "comparison"), name).get("speedup")
            title = f"{workload}: {label(name, arm)}"
            rows.append((title, len(finished), r, gain, exact, cost, costs.payoff(gain, cost), speedup))
    return rows


def _interpolating(options: Options) -> list[tuple[int, float, float, float, float]]:
    """Steps saved by greedy SGD where all samples can be fitted, against the gain."""
    generator = seeded(options.seed, "payoff")
    problem = synthetic(generator, samples=500, width=20, condition=1, noise=0.0).started_far(generator)
    goal = 0.01 * problem.objective(problem.start).item()
    train = partial(run, problem, eta=0.1 / problem.smoothness, steps=3000, seeds=options.count(16), rule="greedy")
    uniform_steps, rows = None, []
    for pool in (1, 2, 4, 8, 16):
        trained = train(generator=generator, pool=pool)
        steps = first(problem.objective(trained.iterates).mean(dim=1) <= goal)
        if pool == 1:
            uniform_steps = steps
        elif uniform_steps and steps:
            rho = checks.gains(problem, trained.iterates[:steps], pool)
            saved, gain = uniform_steps / steps, rho.mean().item()
            rows.append((pool, gain, saved, rho.min().item(), saved / gain))
    return rows

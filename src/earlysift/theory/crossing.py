"""Where greedy becomes worse than uniform, and when to switch it off: predicted, measured, and found live."""

import math
from dataclasses import replace
from functools import partial
from statistics import median
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from earlysift.report.series import Style
from earlysift.seeds import seeded
from earlysift.theory import bounds, checks, switching
from earlysift.theory.asked import EXACT, GREEDY, STEPS, UNIFORM, Asked, Show, far, steps_to
from earlysift.theory.findings import Cell, Chart, Finding, Line, Table, log10, measure, trace
from earlysift.theory.problems import Problem, bundled, objective, sample_gradients, synthetic
from earlysift.theory.runs import gradient_norms, run


def crossing(asked: Asked, show: Show) -> Finding:
    """Where greedy becomes worse than uniform, and when to switch it off: predicted and measured."""
    generator = seeded(asked.seed, "crossing")
    problems = [
        replace(
            far(synthetic(generator, samples=500, width=20, condition=1, tail=1.0), generator),
            name="least squares, condition 1",
        ),
        replace(
            far(synthetic(generator, samples=500, width=20, condition=3, tail=1.0), generator),
            name="least squares, condition 3",
        ),
        replace(
            far(synthetic(generator, samples=500, width=20, condition=10, tail=1.0), generator),
            name="least squares, condition 10",
        ),
        replace(
            far(synthetic(generator, kind="logistic", samples=500, width=20, condition=3), generator),
            name="logistic, condition 3",
        ),
        far(bundled("wine"), generator),
        far(bundled("diabetes"), generator),
    ]
    lines: dict[str, dict[int, Line]] = {
        name: {} for name in ("uniform", "greedy", "greedy, best switch", "the controller")
    }
    levels: list[float] = []
    crossings: list[tuple[Cell, ...]] = []
    switches: list[tuple[Cell, ...]] = []
    ends: list[tuple[Cell, ...]] = []
    for m, given in enumerate(problems):
        minimum = objective(given, given.optimum).item()
        crossings.append((given.name, *_crossing_row(given, asked, generator)))
        show((m + 0.4) / len(problems))
        found = _switching(given, asked)
        levels.append(math.log10(found.target - minimum))
        at = list(range(0, len(found.curves["uniform"]), 10))
        for name, curve in found.curves.items():
            lines[name][m] = (at, [log10(curve[at] - minimum)])
        switches.append((given.name, *found.live, *found.times, *found.plain))
        show((m + 0.8) / len(problems))
        ends.append((given.name, *_ends_row(given, asked, generator)))
        show((m + 1) / len(problems))
    near = [row for row in switches if isinstance(row[3], float) and abs(row[3] - 1) <= 0.2]
    missed = [abs(row[4] - 1) for row in crossings if isinstance(row[4], float)]
    looks = (UNIFORM, GREEDY, EXACT, Style("#159a6c", strong=True))
    return Finding(
        "crossing",
        "Where greedy becomes worse, and when to switch it off",
        f"The mean path predicts the crossing to "
        f"{max(missed, default=math.nan):.0%} or better on the {len(missed)} "
        f"problems with one. The controller's own estimate switches off within 20 % of the best time on {len(near)} of "
        f"{len(problems)} problems ({', '.join(str(row[0]) for row in near)}).",
        [
            Table(
                "Crossing of greedy (R = 4, b = 1) and uniform SGD, in steps",
                ("problem", "where T1 = T2", "mean path", "measured", "mean path / measured"),
                crossings,
            ),
            Table(
                "Switch-off time, in steps: best measured, and found live by the controller (R = 64, "
                "b = 16, unit steps)",
                ("problem", "best", "controller", "controller / best"),
                [row[:4] for row in switches],
            ),
            Table(
                "Steps to the target",
                ("problem", "best switch", "controller", "uniform", "greedy"),
                [(row[0], *row[4:8]) for row in switches],
            ),
            Table(
                "Switch-off time of plain SGD, in steps (R = 16, b = 4)",
                ("problem", "T8 on the mean path", "best measured", "T8 / best"),
                [(row[0], *row[8:]) for row in switches],
            ),
            Table(
                "F - F* after 2,000 steps, mean iterate of the second half (greedy, then uniform: half each)",
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
            "Training by steps of one length, R = 64, b = 16, means over seeds. The target lies "
            "half-way (in logarithms) "
            "between where greedy and where uniform stay; the best switch-off time reaches it first.",
        ),
    )


class Switching(NamedTuple):
    """Switch-off times of one problem, in steps, and what they rest on."""

    target: float
    """Objective to reach."""
    live: tuple[Cell, Cell, Cell]
    """The best time, the controller's, their ratio."""
    times: tuple[Cell, Cell, Cell, Cell]
    """Steps to the target: of the best time, of the controller, of uniform and of greedy training."""
    plain: tuple[Cell, Cell, Cell]
    """For plain SGD: T8 on the mean path, the best time, their ratio."""
    curves: dict[str, Tensor]
    """F, mean over seeds, ``(K + 1,)``."""


def _crossing_row(given: Problem, asked: Asked, generator: Generator) -> tuple[float | int | None, ...]:
    pool, steps, eta = 4, 5000, 0.1 / given.smoothness
    path, plain = (switching.mean_path(given, eta=eta, steps=steps, pool=pool, until=until) for until in (None, 0))
    predicted = switching.crossing(objective(given, path), objective(given, plain))
    curves = []
    train = partial(run, given, eta=eta, steps=steps, seeds=asked.count(32), generator=generator)
    for trained in (train(pool=pool, rule="greedy"), train()):
        curves.append(switching.smoothed(objective(given, trained.iterates).mean(dim=1)))
    seen = switching.crossing(*curves)
    least = checks.gains(given, path[:, None], pool).min().item()
    minimum = objective(given, given.optimum).item()
    guaranteed = bounds.crossing_step(given.distance2, eta, least, checks.floor(given, pool), minimum)
    return guaranteed, predicted, seen, predicted / seen if predicted and seen else None


def _switching(given: Problem, asked: Asked) -> Switching:
    """The best switch-off time for unit steps and for plain SGD, and what finds it."""
    pool, kept, steps = 64, 16, 800
    length = math.sqrt(given.distance2) / 250
    sweep = partial(switching.switched_runs, given, seed=asked.seed)
    swept = sweep(
        length=length, steps=steps, pool=pool, kept=kept, until=list(range(0, steps + 1, 20)), seeds=asked.count(16)
    )
    target = switching.target_between(swept, given)
    best, times = switching.best_switch(swept, target)
    lived = [
        switching.live_switch(
            given, length=length, steps=steps, pool=pool, kept=kept, every=10, seed=asked.seed + 1 + i
        )
        for i in range(asked.count(11))
    ]
    off = median([steps if each is None else each for each, _ in lived])
    curve = torch.stack([curve for _, curve in lived]).mean(dim=0)
    nearest = min(range(len(swept.until)), key=lambda i: abs(swept.until[i] - (best or 0)))
    eta, longer, candidates, best_of = 0.4 / given.smoothness, 1000, 16, 4
    plain = sweep(
        length=eta,
        steps=longer,
        pool=candidates,
        kept=best_of,
        until=list(range(0, longer + 1, 40)),
        seeds=asked.count(8),
        unit=False,
    )
    path = switching.mean_path(given, eta=eta, steps=longer, pool=candidates, kept=best_of)
    reached = [time for time in times if time is not None]
    turn = switching.turning_point(given, path, candidates, best_of)
    plain_best, _ = switching.best_switch(plain, switching.target_between(plain, given))
    return Switching(
        target,
        (best, off, off / best if best else None),
        (min(reached, default=None), steps_to(curve, target), times[0], times[-1]),
        (turn, plain_best, turn / plain_best if turn and plain_best else None),
        {
            "uniform": swept.objective[:, 0],
            "greedy": swept.objective[:, -1],
            "greedy, best switch": swept.objective[:, nearest],
            "the controller": curve,
        },
    )


def _ends_row(given: Problem, asked: Asked, generator: Generator) -> tuple[float, ...]:
    pool, steps, eta = 4, 2000, 0.1 / given.smoothness
    minimum = objective(given, given.optimum).item()
    train = partial(run, given, eta=eta, steps=steps, seeds=asked.count(16), generator=generator)

    def end(iterates: Tensor) -> float:
        return objective(given, iterates[steps // 2 : -1].mean(dim=0)).mean().item() - minimum

    annealed = train(pool=pool, rule="greedy", schedule=lambda step: float(step < steps // 2))
    half = annealed.iterates[steps // 2]
    everyone = torch.arange(len(given.targets)).unsqueeze(0)
    noise = sample_gradients(given, given.optimum.unsqueeze(0), everyone).square().sum(dim=-1).mean().item()
    distance2 = (half - given.optimum).square().sum(dim=1).mean().item()
    promised = bounds.annealed_bound(distance2, steps - steps // 2, eta, given.smoothness, minimum, noise) - minimum
    weighted = train(pool=pool, rule="unbiased", score=gradient_norms)
    return (
        end(train().iterates),
        end(train(pool=pool, rule="greedy").iterates),
        end(annealed.iterates),
        promised,
        end(weighted.iterates),
        checks.check_unbiased_run(given, weighted, eta=eta, pool=pool).bound - minimum,
    )

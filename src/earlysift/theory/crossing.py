r"""Where greedy becomes worse than uniform, and when to switch it off: predicted, measured, and found live.

Three predictions are compared with runs. `bounds.crossing_step` is where the guarantees cross. The *mean path* descends
F and G = E[mean loss of what selection keeps] without randomness, the limit of small steps. And `earlysift.controller`
estimates the switch-off time live from probes, as in training. R is ``pool``, b ``kept``, K ``steps``, S ``seeds``.
"""

import math
from functools import partial
from statistics import median

import torch
from torch import Generator, Tensor

from earlysift import controller, probes
from earlysift.control import Control
from earlysift.probes import Probe
from earlysift.report.series import Style
from earlysift.seeds import seeded
from earlysift.theory import bounds, checks
from earlysift.theory.findings import EXACT, GREEDY, UNIFORM, Finding, Lines, Options, Row, Show, Table, log10
from earlysift.theory.problems import Problem, bundled, synthetic
from earlysift.theory.runs import choice_shares, gradient_norms, run

SMOOTH = 9  # points that a measured curve is averaged over before crossings are determined
PRICES = {"train": 1.0, "probe": 1.0, "score_1": 0.0}  # scoring is free here: only the floor ends greedy selection


def mean_path(
    problem: Problem, *, eta: float, steps: int, pool: int, kept: int = 1, until: int | None = None
) -> Tensor:
    """Descent of G up to step ``until`` (None: throughout) and of F from there, without randomness: ``(K + 1, d)``."""
    w, path = problem.start, [problem.start]
    for k in range(steps):
        greedy = until is None or k < until
        w = w - eta * problem.gradient(w, choice_shares(problem.losses(w), pool, kept) if greedy else None)
        path.append(w)
    return torch.stack(path)


def turning_point(problem: Problem, path: Tensor, pool: int, kept: int = 1) -> int | None:
    r"""First step of a greedy mean path ``(K + 1, d)`` from which a uniform step lowers F more (T8); None if never.

    ``<grad G, grad F> <= |grad F|^2``
    """
    uniform = problem.gradient(path)
    greedy = problem.gradient(path, choice_shares(problem.losses(path), pool, kept))
    return first((greedy * uniform).sum(dim=1) <= uniform.square().sum(dim=1))


def crossing_of(greedy: Tensor, uniform: Tensor) -> int | None:
    """First step after which the greedy curve ``(K,)`` stays above the uniform one; None unless it was below before."""
    ahead = (greedy <= uniform).nonzero()
    if not len(ahead) or not bool((greedy < uniform).any()) or bool(greedy[-1] <= uniform[-1]):
        return None
    return int(ahead[-1]) + 1


def smoothed(curve: Tensor) -> Tensor:
    """A measured curve ``(K,)``, averaged over nine neighbours."""
    padded = torch.nn.functional.pad(curve[None, None], (SMOOTH // 2, SMOOTH // 2), mode="replicate")
    return torch.nn.functional.avg_pool1d(padded, SMOOTH, stride=1)[0, 0]


def first(condition: Tensor) -> int | None:
    """First step at which a condition ``(K,)`` holds; None if it never does."""
    steps = condition.nonzero()
    return int(steps[0]) if len(steps) else None


def switched_runs(
    problem: Problem, *, length: float, pool: int, kept: int, until: list[int], seeds: int, seed: int, unit: bool = True
) -> Tensor:
    """F in training with each of T switch-off times ``until`` on the same candidates, mean over seeds: ``(K + 1, T)``.

    The first time is 0, uniform throughout; the last is K, greedy throughout. If ``unit``, every step has the given
    length, as under Adam or clipping and as the controller assumes; otherwise ``length`` is eta of plain SGD.
    """
    generator = Generator().manual_seed(seed)
    switch = torch.tensor(until)
    # Before they switch, all runs take the same greedy steps, so these are computed once.
    greedy = problem.start.repeat(seeds, 1)
    runs = greedy.repeat(len(until), 1, 1)
    curve = []
    for k in range(until[-1] + 1):
        runs[switch >= k] = greedy
        curve.append(torch.where(switch < k, problem.objective(runs).mean(dim=1), problem.objective(greedy).mean()))
        index = torch.randint(len(problem.targets), (seeds, pool), generator=generator)
        uniform = switch <= k
        w = runs[uniform].flatten(0, 1)
        w = _step(problem, w, index[:, :kept].repeat(int(uniform.sum()), 1), length, unit)
        runs[uniform] = w.view(-1, *greedy.shape)
        hardest = index.gather(1, problem.losses(greedy, index).topk(kept, dim=1).indices)
        greedy = _step(problem, greedy, hardest, length, unit)
    return torch.stack(curve)


def best_switch(curves: Tensor, until: list[int], target: float) -> tuple[int | None, list[int | None]]:
    """The switch-off time that reaches a target first, and the step at which each run reaches it (None: never).

    The best time is the middle of those within a hundredth of the best; None where no switch is needed or none helps.
    """
    times = [first(curve <= target) for curve in curves.T]
    reached = [time for time in times if time is not None]
    if not reached or (times[-1] is not None and times[-1] <= 1.01 * min(reached)):
        return None, times
    # The curve is flat around its optimum, so the middle of the near-best times is steadier than the best one.
    near_best = [t for t, time in zip(until, times, strict=True) if time is not None and time <= 1.01 * min(reached)]
    return round(sum(near_best) / len(near_best)), times


def target_between(curves: Tensor, problem: Problem) -> float:
    """A target that greedy alone does not reach and uniform does: half-way, in logarithms, between their lowest points.

    The first of the curves is uniform throughout, the last greedy throughout.
    """
    lowest = (smoothed(curves[:, i]).min().item() - problem.minimum for i in (0, -1))
    return problem.minimum + math.sqrt(math.prod(lowest))


def live_switch(
    problem: Problem, *, length: float, steps: int, pool: int, kept: int, every: int, seed: int
) -> tuple[int | None, Tensor]:
    """Train by steps of one length as the controller decides, from a probe ``every`` so many steps.

    Returns the step at which it first leaves greedy selection, None if never, and F after every step ``(K + 1,)``. The
    steps after that one are uniform.
    """
    control = Control(depths=(1,), keeps=(kept / pool,), rules=("greedy",), probe_share=1 / every)
    generator = Generator().manual_seed(seed)
    state, off = controller.State(), None
    w = problem.start.unsqueeze(0)
    curve = [problem.objective(w)]
    for k in range(steps):
        index = torch.randint(len(problem.targets), (1, pool), generator=generator)
        losses = problem.losses(w, index)
        if off is None and k >= state.next_probe:
            gradients = problem.gradients(w, index)[0]
            entry = probes.record(Probe(losses[0], {1: losses[0]}, gradients @ gradients.T), kept, control)
            before = state.choice
            state = controller.advance(state, entry, PRICES, control, kept / pool, k).state
            off = k if before is not None and state.choice is None else None
        picks = torch.arange(kept).unsqueeze(0) if state.choice is None else losses.topk(kept, dim=1).indices
        w = _step(problem, w, index.gather(1, picks), length, unit=True)
        curve.append(problem.objective(w))
    return off, torch.cat(curve)


def _step(problem: Problem, w: Tensor, chosen: Tensor, length: float, unit: bool) -> Tensor:
    gradient = problem.gradients(w, chosen).mean(dim=1)
    return w - length * (gradient / gradient.norm(dim=1, keepdim=True).clamp(min=1e-300) if unit else gradient)


def crossing(options: Options, show: Show) -> Finding:
    """Where greedy becomes worse than uniform, and when to switch it off: predicted and measured."""
    generator = seeded(options.seed, "crossing")
    make = partial(synthetic, generator, samples=500, width=20)
    problems = [
        make(name="least squares, condition 1", condition=1, tail=1.0).started_far(generator),
        make(name="least squares, condition 3", condition=3, tail=1.0).started_far(generator),
        make(name="least squares, condition 10", condition=10, tail=1.0).started_far(generator),
        make(name="logistic, condition 3", condition=3, kind="logistic").started_far(generator),
        bundled("wine").started_far(generator),
        bundled("diabetes").started_far(generator),
    ]
    lines: Lines = {name: {} for name in ("uniform", "greedy", "greedy, best switch", "the controller")}
    levels: dict[str, dict[str, float | None]] = {}
    rows: list[list[Row]] = [[], [], [], [], []]
    near, missed = [], []
    for m, problem in enumerate(problems):
        crossed = _crossing_row(problem, options, generator)
        missed += [abs(crossed[3] - 1)] if isinstance(crossed[3], float) else []
        target, curves, live, times = _unit_steps(problem, options)
        near += [problem.name] if isinstance(live[2], float) and abs(live[2] - 1) <= 0.2 else []
        levels[f"log10 (F - F*), {problem.name}"] = {"target": math.log10(target - problem.minimum)}
        for name, curve in zip(lines, curves, strict=True):
            lines[name][m] = (range(0, len(curve), 10), [log10(curve[::10] - problem.minimum)])
        plain = _plain_steps(problem, options)
        ends = _ends_row(problem, options, generator)
        for table, row in zip(rows, (crossed, live, times, plain, ends), strict=True):
            table.append((problem.name, *row))
        show((m + 1) / len(problems))
    return Finding(
        "crossing",
        "Where greedy becomes worse, and when to switch it off",
        f"The mean path predicts the crossing to {max(missed, default=math.nan):.0%} or better on the {len(missed)} "
        f"problems with one. The controller's own estimate switches off within 20 % of the best time on {len(near)} of "
        f"{len(problems)} problems ({', '.join(near)}).",
        [
            Table(
                "Crossing of greedy (R = 4, b = 1) and uniform SGD, in steps",
                ("problem", "where T1 = T2", "mean path", "measured", "mean path / measured"),
                rows[0],
            ),
            Table(
                "Switch-off time, in steps: best measured, and found live by the controller (R = 64, "
                "b = 16, unit steps)",
                ("problem", "best", "controller", "controller / best"),
                rows[1],
            ),
            Table("Steps to the target", ("problem", "best switch", "controller", "uniform", "greedy"), rows[2]),
            Table(
                "Switch-off time of plain SGD, in steps (R = 16, b = 4)",
                ("problem", "T8 on the mean path", "best measured", "T8 / best"),
                rows[3],
            ),
            Table(
                "F - F* after 2,000 steps, mean iterate of the second half (greedy, then uniform: half each)",
                ("problem", "uniform", "greedy", "greedy, then uniform", "its bound T9", "unbiased", "its bound T7+"),
                rows[4],
            ),
        ],
        levels=levels,
        axis_label="steps",
        lines=lines,
        styles=(UNIFORM, GREEDY, EXACT, Style("#159a6c", strong=True)),
        note="Training by steps of one length, R = 64, b = 16, means over seeds. The target lies half-way (in "
        "logarithms) between where greedy and where uniform stay; the best switch-off time reaches it first.",
    )


def _crossing_row(problem: Problem, options: Options, generator: Generator) -> Row:
    """Step at which greedy and uniform SGD cross: by the bounds, by the mean path, measured; the ratio of these two."""
    pool, steps, eta = 4, options.steps(5000), 0.1 / problem.smoothness
    path, uniform = (mean_path(problem, eta=eta, steps=steps, pool=pool, until=t) for t in (None, 0))
    predicted = crossing_of(problem.objective(path), problem.objective(uniform))
    train = partial(run, problem, eta=eta, steps=steps, seeds=options.count(32), generator=generator)
    trained = (train(pool=pool, rule="greedy"), train())
    measured = crossing_of(*(smoothed(problem.objective(each.iterates).mean(dim=1)) for each in trained))
    least, level = checks.gains(problem, path[:, None], pool).min().item(), checks.floor(problem, pool)
    guaranteed = bounds.crossing_step(problem.distance2, eta, least, level, problem.minimum)
    return guaranteed, predicted, measured, predicted / measured if predicted and measured else None


def _unit_steps(problem: Problem, options: Options) -> tuple[float, list[Tensor], Row, Row]:
    """In training by steps of one length: target, curves of F (uniform, greedy, best switch, controller), two rows.

    Rows: switch-off times (best, controller, ratio); steps to the target (best switch, controller, uniform, greedy).
    """
    steps = options.steps(800)
    until = [steps * part // 40 for part in range(41)]
    length, pool, kept = math.sqrt(problem.distance2) / 250, 64, 16
    sweep = partial(switched_runs, problem, length=length, pool=pool, kept=kept, until=until)
    swept = sweep(seeds=options.count(16), seed=options.seed)
    target = target_between(swept, problem)
    best, times = best_switch(swept, until, target)
    control = partial(live_switch, problem, length=length, steps=steps, pool=pool, kept=kept, every=10)
    controlled = [control(seed=options.seed + 1 + i) for i in range(options.count(11))]
    off = median([steps if switch is None else switch for switch, _ in controlled])
    curve = torch.stack([curve for _, curve in controlled]).mean(dim=0)
    nearest = min(range(len(until)), key=lambda i: abs(until[i] - (best or 0)))
    fastest = min((time for time in times if time is not None), default=None)
    curves = [*(swept[:, i] for i in (0, -1, nearest)), curve]
    live = (best, off, off / best if best else None)
    return target, curves, live, (fastest, first(curve <= target), times[0], times[-1])


def _plain_steps(problem: Problem, options: Options) -> Row:
    """Switch-off times of plain SGD: T8 on the mean path, the best measured, their ratio."""
    eta, steps, pool, kept = 0.4 / problem.smoothness, options.steps(1000), 16, 4
    until = [steps * part // 25 for part in range(26)]
    sweep = partial(switched_runs, problem, length=eta, unit=False, pool=pool, kept=kept, until=until)
    swept = sweep(seeds=options.count(8), seed=options.seed)
    best, _ = best_switch(swept, until, target_between(swept, problem))
    path = mean_path(problem, eta=eta, steps=steps, pool=pool, kept=kept)
    turn = turning_point(problem, path, pool, kept)
    return turn, best, turn / best if turn and best else None


def _ends_row(problem: Problem, options: Options, generator: Generator) -> Row:
    """F - F* of uniform, greedy and annealed SGD, the bound on the last, the unbiased rule, the bound on it."""
    pool, steps, eta = 4, options.steps(2000), 0.1 / problem.smoothness
    half, minimum = steps // 2, problem.minimum
    train = partial(run, problem, eta=eta, steps=steps, seeds=options.count(16), generator=generator)
    annealed = train(pool=pool, rule="greedy", until=half)
    weighted = train(pool=pool, rule="unbiased", score=gradient_norms)
    uniform, greedy = train(), train(pool=pool, rule="greedy")
    *ends, weighted_end = (
        problem.objective(each.iterates[half:-1].mean(dim=0)).mean().item() - minimum
        for each in (uniform, greedy, annealed, weighted)
    )
    promised = checks.check_annealed_run(annealed).bound - minimum
    unbiased = checks.check_unbiased_run(weighted).bound - minimum
    return *ends, promised, weighted_end, unbiased

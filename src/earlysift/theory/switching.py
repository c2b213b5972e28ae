r"""When to stop being greedy: where the curves cross, and the switch-off time, predicted and measured.

Three predictions stand beside what runs show. `bounds.crossing_step` and `bounds.switch_level` are closed forms of the
guarantees. The *mean path* descends F and G = E[what selection keeps] without chance, the limit of small steps. And
`earlysift.controller` estimates live from probes, as in training.
"""

import math
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from earlysift import controller
from earlysift.probes import Probe
from earlysift.theory.problems import (
    Problem,
    mean_gradient,
    objective,
    require_smooth_convex,
    sample_gradients,
    sample_losses,
    weighted_gradient,
)
from earlysift.theory.runs import check_pool, choice_shares

SMOOTH = 9  # points that a measured curve is averaged over before crossings are read off
PRICES = {"train": 1.0, "probe": 1.0, "score_1": 0.0}  # scoring is free here: only the floor ends greedy selection


class Switched(NamedTuple):
    """Greedy until each of several steps, uniform from then on."""

    until: list[int]
    objective: Tensor
    """Mean of F over seeds, ``(K + 1, T)``."""


def mean_path(given: Problem, *, eta: float, steps: int, pool: int, kept: int = 1, until: int | None = None) -> Tensor:
    """Descent of G up to a step and of F from there, without chance ``(K + 1, d)``: the limit of small steps.

    Args:
        given: The problem.
        eta: Step size.
        steps: K.
        pool: R.
        kept: b.
        until: First uniform step; None is never.
    """
    require_smooth_convex(given)
    check_pool(pool, kept)
    w, path = given.start, [given.start]
    for k in range(steps):
        greedy = until is None or k < until
        shares = choice_shares(sample_losses(given, w), pool, kept) if greedy else 1 / len(given.targets)
        w = w - eta * weighted_gradient(given, w, shares)
        path.append(w)
    return torch.stack(path)


def turning_point(given: Problem, path: Tensor, pool: int, kept: int = 1) -> int | None:
    r"""First step of a greedy mean path from which a uniform step lowers F more (T8).

    ``<grad G, grad F> <= |grad F|^2``

    Args:
        given: The problem.
        path: From `mean_path`, ``(K + 1, d)``.
        pool: R.
        kept: b.

    Returns:
        The step; None if there is none on the path.
    """
    uniform = mean_gradient(given, path)
    greedy = weighted_gradient(given, path, choice_shares(sample_losses(given, path), pool, kept))
    return _first((greedy * uniform).sum(dim=1) <= uniform.square().sum(dim=1))


def crossing(greedy: Tensor, uniform: Tensor) -> int | None:
    """First step after which the greedy curve stays above the uniform one, after having been below.

    Args:
        greedy: Objective of each step, ``(K,)``.
        uniform: The same of SGD.

    Returns:
        The step; None where the greedy curve never was below, or is at the end.

    Example:
        >>> crossing(torch.tensor([3.0, 1.0, 1.0, 1.0]), torch.tensor([3.0, 2.0, 1.0, 0.5]))
        3
    """
    ahead = (greedy <= uniform).nonzero()
    if not len(ahead) or not bool((greedy < uniform).any()) or bool(greedy[-1] <= uniform[-1]):
        return None
    return int(ahead[-1]) + 1


def smoothed(curve: Tensor) -> Tensor:
    """A measured curve ``(K,)``, averaged over nine neighbours."""
    padded = torch.nn.functional.pad(curve[None, None], (SMOOTH // 2, SMOOTH // 2), mode="replicate")
    return torch.nn.functional.avg_pool1d(padded, SMOOTH, stride=1)[0, 0]


def switched_runs(
    given: Problem,
    *,
    length: float,
    steps: int,
    pool: int,
    kept: int,
    until: list[int],
    seeds: int,
    seed: int,
    unit: bool = True,
) -> Switched:
    """Train with every switch-off time on the same candidates.

    Args:
        given: The problem.
        length: Length of every step if ``unit``, as under Adam or clipping and as the controller supposes; else eta.
        steps: K.
        pool: R.
        kept: b.
        until: Switch-off times.
        seeds: S.
        seed: Of the candidates.
        unit: Whether all steps have one length.
    """
    check_pool(pool, kept)
    generator = Generator().manual_seed(seed)
    switch = torch.tensor(until)
    # Until they switch, all take the same greedy steps, so those are taken once.
    greedy = given.start.repeat(seeds, 1)
    each = greedy.repeat(len(until), 1, 1)
    curve = []
    for k in range(steps + 1):
        each[switch >= k] = greedy
        switched = switch < k
        values = torch.where(switched, objective(given, each).mean(dim=1), objective(given, greedy).mean())
        curve.append(values)
        index = torch.randint(len(given.targets), (seeds, pool), generator=generator)
        uniform = switch <= k
        some = each[uniform].flatten(0, 1)
        plain = index[:, :kept].repeat(int(uniform.sum()), 1)
        moved = some - _step(sample_gradients(given, some, plain).mean(dim=1), length, unit)
        each[uniform] = moved.view(-1, *greedy.shape)
        hardest = index.gather(1, sample_losses(given, greedy, index).topk(kept, dim=1).indices)
        greedy = greedy - _step(sample_gradients(given, greedy, hardest).mean(dim=1), length, unit)
    return Switched(until, torch.stack(curve))


def best_switch(seen: Switched, target: float) -> tuple[int | None, list[int | None]]:
    """The switch-off time that reaches a target first, and the time to it of every one.

    Args:
        seen: Runs with several switch-off times.
        target: Objective to reach.

    Returns:
        The best time (middle of those within a hundredth of the best), None where no switch is needed or none helps;
        and the step at which each is at the target, None where it never is.
    """
    times = [_first(curve <= target) for curve in seen.objective.T]
    reached = [time for time in times if time is not None]
    if not reached or (times[-1] is not None and times[-1] <= 1.01 * min(reached)):
        return None, times
    # Beside the optimum the curve is flat, so the middle of what is as good as the best is steadier than the best.
    close = [t for t, time in zip(seen.until, times, strict=True) if time is not None and time <= 1.01 * min(reached)]
    return round(sum(close) / len(close)), times


def target_between(seen: Switched, given: Problem) -> float:
    """A target that greedy alone does not reach and uniform does: half-way, in logarithms, between their lowest points.

    Args:
        seen: Runs of which the first is uniform throughout and the last greedy throughout.
        given: Their problem.
    """
    minimum = objective(given, given.optimum).item()
    uniform, greedy = (smoothed(seen.objective[:, i]).min().item() - minimum for i in (0, -1))
    return minimum + math.sqrt(uniform * greedy)


def live_switch(
    given: Problem, *, length: float, steps: int, pool: int, kept: int, every: int, seed: int
) -> tuple[int | None, Tensor]:
    """Train as the controller says, from its own probes, and see when it leaves greedy selection for the first time.

    Args:
        given: The problem.
        length: Length of every step.
        steps: K.
        pool: R.
        kept: b.
        every: Steps between probes.
        seed: Of the candidates.

    Returns:
        The step of the first switch-off, None if there is none; and F after every step ``(K + 1,)``. After the switch
        the training is uniform.
    """
    control = controller.Control(depths=(1,), keeps=(kept / pool,), rules=("greedy",), probe_share=1 / every)
    generator = Generator().manual_seed(seed)
    state, off = controller.State(), None
    w = given.start.unsqueeze(0)
    curve = [objective(given, w)]
    for k in range(steps):
        index = torch.randint(len(given.targets), (1, pool), generator=generator)
        losses = sample_losses(given, w, index)
        if off is None and k >= state.next_probe:
            gradients = sample_gradients(given, w, index)[0]
            entry = controller.record(Probe(losses[0], {1: losses[0]}, gradients @ gradients.T), kept, control)
            before = state.choice
            state = controller.advance(state, entry, PRICES, control, kept / pool, k).state
            off = k if before is not None and state.choice is None else None
        greedy = state.choice is not None
        places = losses.topk(kept, dim=1).indices if greedy else torch.arange(kept).unsqueeze(0)
        w = w - _step(sample_gradients(given, w, index.gather(1, places)).mean(dim=1), length, unit=True)
        curve.append(objective(given, w))
    return off, torch.cat(curve)


def _step(gradient: Tensor, length: float, unit: bool) -> Tensor:
    return length * (gradient / gradient.norm(dim=1, keepdim=True).clamp(min=1e-300) if unit else gradient)


def _first(holds: Tensor) -> int | None:
    where = holds.nonzero()
    return int(where[0]) if len(where) else None

"""Measured against bound: every statement on one instance. The experiments and the tests call the same functions."""

import math
from typing import Literal, NamedTuple

import torch
from torch import Generator, Tensor

from earlysift import costs
from earlysift.theory import bounds
from earlysift.theory.linear import agreement_of
from earlysift.theory.problems import (
    STEPS_AT_ONCE,
    Problem,
    objective,
    require_smooth_convex,
    sample_gradients,
    sample_losses,
    weighted_gradient,
)
from earlysift.theory.runs import (
    Candidates,
    Run,
    Score,
    check_pool,
    choice_shares,
    exact_loss,
    expected_choice,
    gradient_norms,
)

SURE = 5.0  # standard errors that an equality may be missed by: once in two million


Kind = Literal["at most", "at least", "equal"]


class Check(NamedTuple):
    """A number that was measured, what a statement says of it, and whether that is so."""

    measured: float
    bound: float
    holds: bool
    kind: Kind

    @property
    def tightness(self) -> float:
        """Measured over bound: at most 1 for an upper bound, at least 1 for a lower one, 1 for an equality.

        nan where the bound is not positive, so says nothing of a loss.
        """
        return self.measured / self.bound if self.bound > 0 else math.nan


def at_most(measured: float, bound: float) -> Check:
    """An upper bound; rounding is forgiven."""
    return Check(measured, bound, measured <= bound * (1 + 1e-9) + 1e-12, "at most")


def at_least(measured: float, bound: float) -> Check:
    """A lower bound; rounding is forgiven."""
    return Check(measured, bound, measured >= bound * (1 - 1e-9) - 1e-12, "at least")


def equal(measured: float, predicted: float, error: float, slack: float = 0.0) -> Check:
    """An equality, measured by chance: within five standard errors, and what the prediction is computed to."""
    return Check(
        measured, predicted, abs(measured - predicted) <= SURE * error + slack + 1e-9 * abs(predicted), "equal"
    )


def floor(given: Problem, pool: int, kept: int = 1) -> float:
    """M*: expected loss at w* of the b candidates that are hardest there, in units of the loss."""
    return greedy_objective(given, given.optimum, pool, kept).item()


def greedy_objective(given: Problem, weights: Tensor, pool: int, kept: int = 1) -> Tensor:
    """G(w) = E[mean of the b largest losses of R candidates], ``(...)``: what exact greedy SGD descends."""
    losses = sample_losses(given, weights)
    return expected_choice(losses, losses, pool, kept)


def greedy_minimum(given: Problem, pool: int, kept: int = 1, steps: int = 1000) -> Tensor:
    """A point u of low G, ``(d,)``: subgradient descent from w*, the best point on the way.

    Any u makes the bounds true, so it need not be the minimum exactly.
    """
    require_smooth_convex(given)
    w = best = given.optimum
    least = greedy_objective(given, w, pool, kept)
    for k in range(steps):
        shares = choice_shares(sample_losses(given, w), pool, kept)
        w = w - weighted_gradient(given, w, shares) / (given.smoothness * (1 + k / 100) ** 0.75)
        value = greedy_objective(given, w, pool, kept)
        if value < least:
            least, best = value, w
    return best


def gains(given: Problem, weights: Tensor, pool: int, kept: int = 1, score: Score = exact_loss) -> Tensor:
    """Selection gain rho at every point, exactly, for a score without chance: ``(K, S)`` for weights ``(K, S, d)``."""
    parts = []
    for some in torch.split(weights, STEPS_AT_ONCE):
        losses = sample_losses(given, some)
        scores = losses
        if score is not exact_loss:
            flat = some.flatten(0, 1)
            everyone = torch.arange(len(given.targets)).expand(len(flat), -1)
            seen = Candidates(given, flat, everyone, losses.flatten(0, 1), Generator())
            scores = score(seen).view_as(losses)
        parts.append(expected_choice(losses, scores, pool, kept) / losses.mean(dim=-1).clamp(min=1e-300))
    return torch.cat(parts)


def check_run(
    given: Problem,
    seen: Run,
    *,
    eta: float,
    pool: int = 1,
    kept: int = 1,
    gain: Tensor | None = None,
    lost: float = 0.0,
    comparator: Tensor | None = None,
) -> dict[str, Check]:
    r"""T1 (T2 for a pool of one) and what sharpens it, on a run.

    Args:
        given: The problem.
        seen: The run.
        eta: Its step size, in (0, 1 / L).
        pool: R.
        kept: b.
        gain: Gain of its score along the run, or a lower bound on it, ``(K, S)``; that of the exact loss if None.
        lost: Least that the expected loss of the chosen may fall short of ``gain * F``: 2 e of an additive error.
        comparator: u ``(d,)`` for ``comparator``; w* if None.

    Returns:
        ``path``: the inequality behind all, on the worst seed (no expectation: it holds on every path).
        ``T1``, ``sharp`` (T1+), ``comparator`` (T1+ from u), ``time`` (T1+ with the gain of every step).

    Raises:
        ValueError: If the problem is not smooth and convex, or eta out of range.
    """
    require_smooth_convex(given)
    check_pool(pool, kept)
    if not 0 < eta * given.smoothness < 1:
        raise ValueError(f"The bound needs 0 < eta < 1 / L = {1 / given.smoothness:.4g}, got eta = {eta:.4g}.")
    visited = seen.iterates[:-1]
    steps = len(visited)
    rho = gains(given, visited, pool, kept) if gain is None else gain
    least = rho.min().item()
    measured = objective(given, visited.mean(dim=0)).mean().item()
    level, short = floor(given, pool, kept), lost / least
    common = (steps, eta, given.smoothness)
    checks = {
        "path": _worst_path(given, seen, eta),
        "T1": at_most(
            measured,
            bounds.greedy_bound(given.distance2, *common, level, least) + short / (1 - given.smoothness * eta),
        ),
        "sharp": at_most(measured, bounds.sharp_bound(given.distance2, *common, level, least) + short),
    }
    u = given.optimum if comparator is None else comparator
    from_u = (given.start - u).square().sum().item()
    at_u = greedy_objective(given, u, pool, kept).item()
    checks["comparator"] = at_most(measured, bounds.sharp_bound(from_u, *common, at_u, least) + short)
    # The gain of every step instead of its least: the mean iterate weighted by the gain.
    total = rho.sum(dim=0)
    weighted_mean = (rho.unsqueeze(-1) * visited).sum(dim=0) / total.unsqueeze(-1)
    weighed = (total / steps * objective(given, weighted_mean)).mean().item()
    checks["time"] = at_most(weighed, bounds.sharp_bound(from_u, *common, at_u) + lost)
    return checks


def check_pools(
    given: Problem,
    weights: Tensor,
    score: Score,
    pool: int,
    kept: int,
    generator: Generator,
    *,
    factor: float = 1.0,
    lost: float = 0.0,
) -> Check:
    """T3 and T4 pool by pool: what a score keeps is at least ``factor * (what the exact loss keeps) - lost``.

    Args:
        given: The problem.
        weights: Points to draw a pool at, ``(S, d)``.
        score: The approximate loss.
        pool: R.
        kept: b.
        generator: The only source of randomness.
        factor: ``(1 - d) / (1 + d)`` of T3.
        lost: ``2 e`` of T4.

    Returns:
        Means over the pools; holds only if it does in every single one.
    """
    check_pool(pool, kept)
    index = torch.randint(len(given.targets), (len(weights), pool), generator=generator)
    losses = sample_losses(given, weights, index)
    scores = score(Candidates(given, weights, index, losses, generator))
    ours = losses.gather(1, scores.topk(kept, dim=1).indices).mean(dim=1)
    least = factor * losses.topk(kept, dim=1).values.mean(dim=1) - lost
    single = bool((ours >= least - 1e-9 * losses.amax(dim=1) - 1e-12).all())
    return Check(ours.mean().item(), least.mean().item(), single, "at least")


def check_correlated_gain(correlation: float, pool: int, kept: int, pools: int, generator: Generator) -> Check:
    """T5 on jointly Gaussian losses and scores: gain measured over pools, against ``1 + r (rho - 1)``."""
    spread = 0.2  # of losses with mean 1, so that a gain is 1 + 0.2 e(R, b)
    exact, noise = torch.randn(2, pools, pool, generator=generator, dtype=torch.float64)
    scores = correlation * exact + math.sqrt(1 - correlation**2) * noise
    gain = (1 + spread * exact.gather(1, scores.topk(kept, dim=1).indices)).mean(dim=1)
    predicted = costs.approximate_gain(1 + spread * bounds.normal_choice(pool, kept), correlation)
    return equal(gain.mean().item(), predicted, gain.std().item() / math.sqrt(pools))


def check_agreement(correlation: float, pool: int, pools: int, generator: Generator, *, squares: bool = False) -> Check:
    """T6 on jointly Gaussian losses and scores, or on their squares."""
    exact, noise = torch.randn(2, pools, pool, generator=generator, dtype=torch.float64)
    scores = correlation * exact + math.sqrt(1 - correlation**2) * noise
    seen = agreement_of(scores.abs(), exact.abs(), 1) if squares else agreement_of(scores, exact, 1)
    predicted = (bounds.agreement_of_squares if squares else bounds.agreement)(correlation, pool)
    return equal(seen.argmax, predicted, seen.argmax_error, slack=3e-4)


def check_second_moment(given: Problem, weights: Tensor, pool: int, pools: int, generator: Generator) -> Check:
    """T7 for pools: second moment of the unbiased rule's gradient over uniform's, at a point ``(d,)``."""
    everyone = torch.arange(len(given.targets)).unsqueeze(0)
    norms = sample_gradients(given, weights.unsqueeze(0), everyone)[0].norm(dim=-1)
    index = torch.randint(len(norms), (pools, pool), generator=generator)
    drawn = norms[index].clamp(min=1e-300)
    place = torch.multinomial(drawn, 1, generator=generator)
    weight = drawn.mean(dim=1) / drawn.gather(1, place).squeeze(1)
    squares = (weight * norms[index.gather(1, place).squeeze(1)]).square() / norms.square().mean()
    predicted = bounds.pool_second_moment(costs.second_moment_ratio(norms), pool)
    return equal(squares.mean().item(), predicted, squares.std().item() / math.sqrt(pools))


def check_unbiased_run(given: Problem, seen: Run, *, eta: float, pool: int) -> Check:
    """T7+ on a run of the unbiased rule by gradient norms: F at the mean iterate against `unbiased_bound`."""
    require_smooth_convex(given)
    visited = seen.iterates[:-1]
    most = max(_second_moments(given, some, pool).max().item() for some in torch.split(visited, STEPS_AT_ONCE))
    minimum = objective(given, given.optimum).item()
    measured = objective(given, visited.mean(dim=0)).mean().item()
    bound = bounds.unbiased_bound(given.distance2, len(visited), eta, given.smoothness, minimum, most)
    return at_most(measured, bound)


def _second_moments(given: Problem, weights: Tensor, pool: int) -> Tensor:
    flat = weights.flatten(0, -2)
    everyone = torch.arange(len(given.targets)).expand(len(flat), -1)
    norms = gradient_norms(Candidates(given, flat, everyone, flat, Generator()))
    ratio = norms.mean(dim=1).square() / norms.square().mean(dim=1).clamp(min=1e-300)
    return ratio + (1 - ratio) / pool


def _worst_path(given: Problem, seen: Run, eta: float) -> Check:
    r"""mean_k f_k(w_k) <= D^2 / (2 eta K) + mean_k f_k(w*) / (1 - L eta), f_k the batch of step k: on every seed."""
    steps = len(seen.chosen)
    paid = torch.stack(
        [sample_losses(given, w, chosen).mean(dim=1) for w, chosen in zip(seen.iterates[:-1], seen.chosen, strict=True)]
    ).mean(dim=0)
    best = sample_losses(given, given.optimum)[seen.chosen].mean(dim=(0, 2))
    bound = given.distance2 / (2 * eta * steps) + best / (1 - given.smoothness * eta)
    worst = int((paid / bound.clamp(min=1e-300)).argmax())
    return at_most(paid[worst].item(), bound[worst].item())

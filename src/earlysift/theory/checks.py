"""Measured value against bound: every statement on one instance. Experiments and tests call the same functions."""

import math
from typing import Literal, NamedTuple

import torch
from torch import Generator, Tensor

from earlysift import costs
from earlysift.theory import bounds, runs
from earlysift.theory.problems import STEPS_AT_ONCE, Problem, normal
from earlysift.theory.runs import Approximation, Run, Score

SURE = 5.0  # standard errors by which an equality may be missed: once in two million


class Check(NamedTuple):
    """A measured number, what a statement says of it, and whether the statement holds."""

    measured: float
    bound: float
    holds: bool
    kind: Literal["at most", "at least", "equal"]

    @property
    def tightness(self) -> float:
        """Measured over bound; nan where the bound is not positive, which says nothing about a loss."""
        return self.measured / self.bound if self.bound > 0 else math.nan


class Agreement(NamedTuple):
    """Share of pools in which score and loss have the same argmax, its standard error, mean overlap of the b kept."""

    argmax: float
    argmax_error: float
    overlap: float


def at_most(measured: float, bound: float) -> Check:
    """An upper bound, up to rounding."""
    return Check(measured, bound, measured <= bound * (1 + 1e-9) + 1e-12, "at most")


def equal(measured: float, predicted: float, error: float, slack: float = 0.0) -> Check:
    """A Monte Carlo estimate against an equality: within five standard errors and the precision of the prediction."""
    tolerance = SURE * error + slack + 1e-9 * abs(predicted)
    return Check(measured, predicted, abs(measured - predicted) <= tolerance, "equal")


def greedy_objective(problem: Problem, weights: Tensor, pool: int, kept: int = 1) -> Tensor:
    """G(w) = E[mean of the b largest losses of R candidates], ``(...)``: what exact greedy SGD descends."""
    losses = problem.losses(weights)
    return runs.expected_choice(losses, losses, pool, kept)


def floor(problem: Problem, pool: int, kept: int = 1) -> float:
    """M* = G(w*): expected loss at w* of the b candidates that are hardest there."""
    return greedy_objective(problem, problem.optimum, pool, kept).item()


def greedy_minimum(problem: Problem, pool: int, kept: int = 1, steps: int = 1000) -> Tensor:
    """The best point u of a subgradient descent of G from w*, ``(d,)``; the bounds hold for any u, minimum or not."""
    w = best = problem.optimum
    least = greedy_objective(problem, w, pool, kept)
    for k in range(steps):
        shares = runs.choice_shares(problem.losses(w), pool, kept)
        w = w - problem.gradient(w, shares) / (problem.smoothness * (1 + k / 100) ** 0.75)
        value = greedy_objective(problem, w, pool, kept)
        if value < least:
            least, best = value, w
    return best


def gains(problem: Problem, weights: Tensor, pool: int, kept: int = 1, score: Score = runs.exact_loss) -> Tensor:
    """Exact selection gain rho at points ``(K, S, d)``, for a score without randomness: ``(K, S)``; 1 where F is 0."""
    parts = []
    for steps in torch.split(weights, STEPS_AT_ONCE):
        everyone = runs.population(problem, steps.flatten(0, 1))
        choice, mean = runs.expected_choice(everyone.losses, score(everyone), pool, kept), everyone.losses.mean(dim=-1)
        parts.append(torch.where(mean > 1e-300, choice / mean, 1.0).view(steps.shape[:2]))
    return torch.cat(parts)


def check_run(
    run: Run, *, gain: Tensor | None = None, lost: float = 0.0, comparator: Tensor | None = None
) -> dict[str, Check]:
    r"""T1 (T2 for a pool of one) and its sharper versions, on a run with eta in (0, 1 / L).

    Args:
        run: The run.
        gain: Gain of the run's score, or a lower bound on it, at every step ``(K, S)``; that of the exact loss if None.
        lost: How far the expected loss of the kept may fall short of ``gain * F``: 2 e of an additive error.
        comparator: u ``(d,)``; w* if None.

    Returns:
        ``path``, the inequality behind all, on the worst seed (it holds on every path, without expectation); ``T1``;
        ``sharp`` (T1+); ``comparator`` (T1+ from u); ``time`` (T1+ with the gain of every step).
    """
    problem, visited, size = run.problem, run.iterates[:-1], (run.pool, run.kept)
    common = (len(visited), run.eta, problem.smoothness)
    rho = gains(problem, visited, *size) if gain is None else gain
    least = rho.min().item()
    measured = problem.objective(visited.mean(dim=0)).mean().item()
    from_optimum = (problem.distance2, *common, floor(problem, *size), least)
    u = problem.optimum if comparator is None else comparator
    from_u = ((problem.start - u).square().sum().item(), *common, greedy_objective(problem, u, *size).item())
    plain = bounds.greedy_bound(*from_optimum) + lost / least / (1 - problem.smoothness * run.eta)
    # The gain of every step instead of the least: the mean iterate is weighted by the gain.
    total = rho.sum(dim=0)
    weighted_mean = (rho.unsqueeze(-1) * visited).sum(dim=0) / total.unsqueeze(-1)
    weighted = (total / len(visited) * problem.objective(weighted_mean)).mean().item()
    return {
        "path": _worst_path(run),
        "T1": at_most(measured, plain),
        "sharp": at_most(measured, bounds.sharp_bound(*from_optimum) + lost / least),
        "comparator": at_most(measured, bounds.sharp_bound(*from_u, least) + lost / least),
        "time": at_most(weighted, bounds.sharp_bound(*from_u) + lost),
    }


def check_pools(
    problem: Problem, weights: Tensor, approximation: Approximation, pool: int, kept: int, generator: Generator
) -> Check:
    """T3 and T4 pool by pool, with a pool at each of the points ``(S, d)``.

    Returns means over the pools; the check holds only if it does in every single one.
    """
    index = torch.randint(len(problem.targets), (len(weights), pool), generator=generator)
    losses = problem.losses(weights, index)
    scores = approximation.score(runs.Candidates(problem, weights, index, losses, generator))
    by_score = losses.gather(1, scores.topk(kept, dim=1).indices).mean(dim=1)
    least = approximation.factor * losses.topk(kept, dim=1).values.mean(dim=1) - approximation.lost
    holds = bool((by_score >= least - 1e-9 * losses.amax(dim=1) - 1e-12).all())
    return Check(by_score.mean().item(), least.mean().item(), holds, "at least")


def check_correlated_gain(correlation: float, pool: int, kept: int, pools: int, generator: Generator) -> Check:
    """T5 on jointly Gaussian losses and scores: gain measured over pools, against ``1 + r (rho - 1)``."""
    deviation = 0.2  # of losses with mean 1, so that a gain is 1 + 0.2 e(R, b)
    exact, scores = _gaussian_pairs(correlation, pool, pools, generator)
    gain = (1 + deviation * exact.gather(1, scores.topk(kept, dim=1).indices)).mean(dim=1)
    predicted = costs.approximate_gain(1 + deviation * bounds.normal_choice(pool, kept), correlation)
    return equal(gain.mean().item(), predicted, gain.std().item() / math.sqrt(pools))


def check_agreement(correlation: float, pool: int, pools: int, generator: Generator, *, squares: bool = False) -> Check:
    """T6 on jointly Gaussian losses and scores, or on their squares."""
    exact, scores = _gaussian_pairs(correlation, pool, pools, generator)
    found = agreement_of(scores.abs(), exact.abs(), 1) if squares else agreement_of(scores, exact, 1)
    predicted = bounds.agreement(correlation, pool, squares=squares)
    return equal(found.argmax, predicted, found.argmax_error, slack=3e-4)


def agreement_of(scores: Tensor, losses: Tensor, kept: int) -> Agreement:
    """Agreement of scores with losses, ``(pools, R)`` each."""
    pools = len(scores)
    hit = (scores.argmax(dim=1) == losses.argmax(dim=1)).double()
    kept_by_score, kept_by_loss = (
        torch.zeros_like(x).scatter(1, x.topk(kept, dim=1).indices, 1.0) for x in (scores, losses)
    )
    overlap = (kept_by_score * kept_by_loss).sum(dim=1) / kept
    # A measured share of 0 or 1 has no spread; its error is still of the order of one pool.
    error = max(hit.std(correction=0).item() / math.sqrt(pools), 1 / pools)
    return Agreement(hit.mean().item(), error, overlap.mean().item())


def check_second_moment(problem: Problem, weights: Tensor, pool: int, pools: int, generator: Generator) -> Check:
    """T7 for pools: second moment of the unbiased rule's gradient over uniform's, at a point ``(d,)``."""
    norms = runs.gradient_norms(runs.population(problem, weights.unsqueeze(0)))[0]
    index = torch.randint(len(norms), (pools, pool), generator=generator)
    candidates = norms[index].clamp(min=1e-300)
    pick = torch.multinomial(candidates, 1, generator=generator)
    weight = candidates.mean(dim=1) / candidates.gather(1, pick).squeeze(1)
    squares = (weight * norms[index.gather(1, pick).squeeze(1)]).square() / norms.square().mean()
    predicted = bounds.pool_second_moment(costs.second_moment_ratio(norms), pool)
    return equal(squares.mean().item(), predicted, squares.std().item() / math.sqrt(pools))


def check_unbiased_run(run: Run) -> Check:
    """T7+ on a run of the unbiased rule by gradient norms: T2 with V L in place of L, V the largest second moment."""
    problem, visited, largest = run.problem, run.iterates[:-1], 0.0
    for steps in torch.split(visited, STEPS_AT_ONCE):
        norms = runs.gradient_norms(runs.population(problem, steps.flatten(0, 1)))
        ratios = norms.mean(dim=1).square() / norms.square().mean(dim=1).clamp(min=1e-300)
        largest = max(largest, ratios.max().item())
    measured = problem.objective(visited.mean(dim=0)).mean().item()
    setting = (len(visited), run.eta, problem.smoothness * bounds.pool_second_moment(largest, run.pool))
    return at_most(measured, bounds.greedy_bound(problem.distance2, *setting, problem.minimum))


def check_annealed_run(run: Run) -> Check:
    r"""T9 on a run that is uniform from step t = ``until`` on: F at the mean iterate of its K uniform steps.

    ``E F(mean w) <= F* + E|w_t - w*|^2 / (2 eta K) + eta sigma*^2 / (2 (1 - L eta))``, sigma*^2 = E|grad f_i(w*)|^2: F*
    is reached, greedy only shortens the way.
    """
    problem, uniform = run.problem, run.iterates[run.until :]
    everyone = torch.arange(len(problem.targets)).unsqueeze(0)
    noise = problem.gradients(problem.optimum.unsqueeze(0), everyone).square().sum(dim=-1).mean().item()
    distance2 = (uniform[0] - problem.optimum).square().sum(dim=1).mean().item()
    measured = problem.objective(uniform[:-1].mean(dim=0)).mean().item()
    transient = distance2 / (2 * run.eta * (len(uniform) - 1))
    return at_most(measured, problem.minimum + transient + run.eta * noise / (2 * (1 - problem.smoothness * run.eta)))


def _gaussian_pairs(correlation: float, pool: int, pools: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Standard normal losses and scores with a correlation, ``(pools, R)`` each."""
    exact, noise = normal(generator, 2, pools, pool)
    return exact, correlation * exact + math.sqrt(1 - correlation**2) * noise


def _worst_path(run: Run) -> Check:
    r"""mean_k f_k(w_k) <= D^2 / (2 eta K) + mean_k f_k(w*) / (1 - L eta), f_k the batch of step k: on every seed."""
    problem, steps = run.problem, zip(run.iterates[:-1], run.chosen, strict=True)
    visited = torch.stack([problem.losses(w, chosen).mean(dim=1) for w, chosen in steps]).mean(dim=0)
    at_optimum = problem.losses(problem.optimum)[run.chosen].mean(dim=(0, 2))
    bound = problem.distance2 / (2 * run.eta * len(run.chosen)) + at_optimum / (1 - problem.smoothness * run.eta)
    worst = int((visited / bound.clamp(min=1e-300)).argmax())
    return at_most(visited[worst].item(), bound[worst].item())

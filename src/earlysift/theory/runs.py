r"""SGD and greedy SGD on many seeds at once, and the exact expectation of what selection does at a point.

A step draws R candidates independently (with replacement), scores them, and takes the mean exact gradient of the b with
the largest scores; b = 1 is the paper's. Since the samples are finite, expectations over the selection at a point w are
sums over ranks with known weights (`rank_shares`), not estimates.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

import torch
from torch import Generator, Tensor

from earlysift.theory.bounds import multiplicative_gain, require_correlation, require_pool
from earlysift.theory.problems import Problem, normal


@dataclass(frozen=True)
class Candidates:
    """What a score may use: weights ``(S, d)``, samples ``(S, R)`` and their exact losses ``(S, R)``, on every seed."""

    problem: Problem
    weights: Tensor
    index: Tensor
    losses: Tensor
    generator: Generator


Score = Callable[[Candidates], Tensor]
"""Candidates to scores ``(S, R)``; any callable will do."""


class Approximation(NamedTuple):
    """A score with bounded errors: it keeps at least ``factor`` times what exact losses keep, less ``lost``."""

    score: Score
    factor: float = 1.0
    lost: float = 0.0


class Run(NamedTuple):
    """What `run` was given, iterates w_0 ... w_K ``(K + 1, S, d)``, and the samples of each step ``(K, S, b)``."""

    problem: Problem
    eta: float
    pool: int
    kept: int
    until: int | None
    iterates: Tensor
    chosen: Tensor


def population(problem: Problem, weights: Tensor) -> Candidates:
    """All samples as candidates at points ``(S, d)``, for scores without randomness."""
    index = torch.arange(len(problem.targets)).expand(len(weights), -1)
    return Candidates(problem, weights, index, problem.losses(weights), Generator())


def exact_loss(candidates: Candidates) -> Tensor:
    """The exact loss: greedy SGD without approximation."""
    return candidates.losses


def order_kept(candidates: Candidates) -> Tensor:
    """Other numbers in the same order: nothing is lost."""
    return torch.log1p(candidates.losses) - 7.0


def gradient_norms(candidates: Candidates) -> Tensor:
    """Length of each candidate's gradient: the score for which the unbiased rule is best (T7)."""
    norms: Tensor = candidates.problem.gradients(candidates.weights, candidates.index).norm(dim=-1)
    return norms


def multiplicative(d: float, *, worst: bool = False) -> Approximation:
    """Scores within a factor of the loss, ``(1 - d) f <= g <= (1 + d) f`` with d in [0, 1) (T3).

    Errors are random, or, if ``worst``, those that lead to the worst pick.
    """
    score = _bounded(lambda losses: ((1 - d) * losses, (1 + d) * losses), worst)
    return Approximation(score, factor=multiplicative_gain(1.0, d))


def additive(e: float, *, worst: bool = False) -> Approximation:
    """Scores within a distance of the loss, ``|g - f| <= e`` in units of the loss (T4).

    ``E f(kept) >= rho F - 2 e``, which adds ``2 e / (rho (1 - L eta))`` to T1 and ``2 e / rho`` to T1+. Errors are
    random, or, if ``worst``, those that lead to the worst pick.
    """
    if not 0 <= e < math.inf:
        raise ValueError(f"The additive error e must be finite and at least 0, got {e}.")
    return Approximation(_bounded(lambda losses: (losses - e, losses + e), worst), lost=2 * e)


def correlated(r: float) -> Score:
    """Scores with correlation r to the loss: the standardised loss, mixed with Gaussian noise (T5)."""
    require_correlation(r)

    def score(candidates: Candidates) -> Tensor:
        losses = candidates.problem.losses(candidates.weights)
        deviation = losses.std(dim=-1, correction=0, keepdim=True).clamp(min=1e-300)
        standard = (candidates.losses - losses.mean(dim=-1, keepdim=True)) / deviation
        return r * standard + math.sqrt(1 - r**2) * normal(candidates.generator, *standard.shape)

    return score


def early_exit(features: int) -> Score:
    """Losses of the same weights on the first ``features`` of the d features: an exit of a linear model."""
    if features < 1:
        raise ValueError(f"An exit must see at least one feature, got {features}.")

    def score(candidates: Candidates) -> Tensor:
        is_seen = torch.arange(candidates.weights.size(-1)) < features
        return candidates.problem.losses(candidates.weights.where(is_seen, 0.0), candidates.index)

    return score


def run(
    problem: Problem,
    *,
    eta: float,
    steps: int,
    seeds: int,
    generator: Generator,
    pool: int = 1,
    kept: int = 1,
    rule: Literal["uniform", "greedy", "unbiased"] = "uniform",
    score: Score = exact_loss,
    until: int | None = None,
) -> Run:
    r"""Train on S seeds at once: ``w <- w - eta * mean over the kept of weight_i grad f_i(w)``.

    ``greedy`` keeps the b largest scores, weights 1; ``unbiased`` draws b of the pool in proportion to the scores, with
    weights ``mean score / score_i``; ``uniform`` keeps the first b, as every rule does from step ``until`` on.
    K ``steps`` on S ``seeds``, R ``pool``, b ``kept``; the generator is the only source of randomness.

    Example:
        >>> from earlysift.theory.problems import LOSSES, make_problem
        >>> p = make_problem("mean", torch.ones(2, 1), torch.tensor([1.0, 1.0]), LOSSES["squared"])
        >>> run(p, eta=0.5, steps=2, seeds=1, generator=torch.Generator()).iterates.flatten()
        tensor([0.0000, 0.5000, 0.7500], dtype=torch.float64)
    """
    require_pool(pool, kept)
    if not 0 < eta < math.inf or steps < 1 or seeds < 1:
        raise ValueError(f"Expected eta > 0, steps >= 1 and seeds >= 1, got {eta}, {steps} and {seeds}.")
    w = problem.start.repeat(seeds, 1)
    iterates = torch.empty(steps + 1, *w.shape, dtype=torch.float64)
    chosen = torch.empty(steps, seeds, kept, dtype=torch.int64)
    iterates[0] = w
    for k in range(steps):
        index = torch.randint(len(problem.targets), (seeds, pool), generator=generator)
        shares = torch.full((seeds, kept), 1 / kept, dtype=torch.float64)
        picks = torch.arange(kept).expand(seeds, kept)
        if rule != "uniform" and (until is None or k < until):
            scores = score(Candidates(problem, w, index, problem.losses(w, index), generator))
            if rule == "greedy":
                picks = scores.topk(kept, dim=1).indices
            else:
                scores = scores.clamp(min=1e-300)
                picks = torch.multinomial(scores, kept, replacement=True, generator=generator)
                shares = scores.mean(dim=1, keepdim=True) / scores.gather(1, picks) / kept
        chosen[k] = index.gather(1, picks)
        w = w - eta * (shares.unsqueeze(-1) * problem.gradients(w, chosen[k])).sum(dim=1)
        iterates[k + 1] = w
    return Run(problem, eta, pool, kept, until, iterates, chosen)


@lru_cache(maxsize=64)
def rank_shares(samples: int, pool: int, kept: int = 1) -> Tensor:
    r"""Share of a greedy batch that falls to the sample of each rank, largest score first: ``(n,)``, sum 1.

    ``share_j = (E min(b, B_j) - E min(b, B_{j-1})) / b`` with ``B_j ~ Binomial(R, j / n)``, the number of candidates
    among the first j; for b = 1, ``((n - j + 1)^R - (n - j)^R) / n^R``. The R candidates are drawn with replacement.

    Example:
        >>> rank_shares(2, 2)
        tensor([0.7500, 0.2500], dtype=torch.float64)
    """
    require_pool(pool, kept)
    chance = torch.arange(samples + 1, dtype=torch.float64)[:, None] / samples
    counts = torch.arange(pool + 1, dtype=torch.float64)
    ways = torch.lgamma(counts[-1] + 1) - torch.lgamma(counts + 1) - torch.lgamma(pool - counts + 1)
    log_mass = ways + torch.xlogy(counts, chance) + torch.xlogy(pool - counts, 1 - chance)
    return (log_mass.exp() @ counts.clamp(max=kept)).diff() / kept


def expected_choice(values: Tensor, scores: Tensor, pool: int, kept: int = 1) -> Tensor:
    r"""Mean of values ``(..., n)`` over what greedy selection by scores ``(..., n)`` keeps, exactly: ``(...)``.

    With values = scores = f(w) it is ``rho(w) F(w) = G(w)``; at w* it is M*.
    """
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    return values.expand(scores.shape).gather(-1, order) @ rank_shares(scores.size(-1), pool, kept)


def choice_shares(scores: Tensor, pool: int, kept: int = 1) -> Tensor:
    """Share of a greedy batch that falls to every sample: `rank_shares`, in the order of the samples ``(..., n)``."""
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    shares = rank_shares(scores.size(-1), pool, kept).expand(scores.shape)
    return torch.empty_like(shares).scatter(-1, order, shares)


def _bounded(interval: Callable[[Tensor], tuple[Tensor, Tensor]], worst: bool) -> Score:
    """Scores within the interval of each loss: uniformly random, or those whose argmax has the least exact loss."""

    def score(candidates: Candidates) -> Tensor:
        low, high = interval(candidates.losses)
        if not worst:
            return low + (high - low) * torch.rand(low.shape, generator=candidates.generator, dtype=torch.float64)
        eligible = high >= low.max(dim=1, keepdim=True).values
        victim = torch.where(eligible, candidates.losses, math.inf).argmin(dim=1, keepdim=True)
        # Only the order matters. Putting the victim on top breaks the ties that the errors allow against us.
        return low.scatter(1, victim, math.inf)

    return score

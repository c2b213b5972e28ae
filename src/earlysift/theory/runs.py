r"""SGD and greedy SGD on many seeds at once, and what selection does at a point, exactly.

A step draws R candidates independently (with replacement), scores them, and takes the mean exact gradient of the b with
the largest scores; b = 1 is the paper's. Since the samples are finite, what selection expects at a point w is a sum
over ranks with known weights (`rank_shares`), not an estimate.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

import torch
from torch import Generator, Tensor

from earlysift.schedules import Schedule, constant
from earlysift.theory.problems import Problem, sample_gradients, sample_losses

Rule = Literal["uniform", "greedy", "unbiased"]


@dataclass(frozen=True)
class Candidates:
    """What a score may look at: the candidates of one step on every seed."""

    problem: Problem
    weights: Tensor
    """w, ``(S, d)``."""
    index: Tensor
    """Which samples, ``(S, R)``."""
    exact: Tensor
    """Exact losses, ``(S, R)``."""
    generator: Generator


Score = Callable[[Candidates], Tensor]
"""Candidates to scores ``(S, R)``; a lambda is a full citizen."""


class Run(NamedTuple):
    """One way of training on S seeds."""

    iterates: Tensor
    """w_0 ... w_K, ``(K + 1, S, d)``."""
    chosen: Tensor
    """Samples that each step trained on, ``(K, S, b)``."""


def exact_loss(seen: Candidates) -> Tensor:
    """The exact loss: greedy SGD without approximation."""
    return seen.exact


def order_kept(seen: Candidates) -> Tensor:
    """Another number, the same order: nothing is lost."""
    return torch.log1p(seen.exact) - 7.0


def multiplicative(d: float, *, worst: bool = False) -> Score:
    """Scores within a factor of the loss, ``(1 - d) f <= g <= (1 + d) f`` (T3).

    Args:
        d: In [0, 1).
        worst: Errors at random if False; else those that make the pick as bad as they can.

    Raises:
        ValueError: If d is outside [0, 1).
    """
    if not 0 <= d < 1:
        raise ValueError(f"The multiplicative error d must be in [0, 1), got {d}: at 1 a score may be zero anywhere.")

    def score(seen: Candidates) -> Tensor:
        low, high = (1 - d) * seen.exact, (1 + d) * seen.exact
        return _worst(seen, low, high) if worst else low + (high - low) * _uniform(seen)

    return score


def additive(e: float, *, worst: bool = False) -> Score:
    """Scores within a distance of the loss, ``|g - f| <= e`` (T4).

    Args:
        e: At least 0, in units of the loss.
        worst: Errors at random if False; else those that make the pick as bad as they can.

    Raises:
        ValueError: If e is negative.
    """
    if not 0 <= e < math.inf:
        raise ValueError(f"The additive error e must be finite and at least 0, got {e}.")

    def score(seen: Candidates) -> Tensor:
        low, high = seen.exact - e, seen.exact + e
        return _worst(seen, low, high) if worst else low + (high - low) * _uniform(seen)

    return score


def correlated(r: float) -> Score:
    """Scores with correlation r to the loss: the standardised loss, mixed with Gaussian noise (T5).

    Args:
        r: In [-1, 1]; below 0 the score ranks backwards.

    Raises:
        ValueError: If r is outside [-1, 1].
    """
    if not -1 <= r <= 1:
        raise ValueError(f"A correlation must be in [-1, 1], got {r}.")

    def score(seen: Candidates) -> Tensor:
        every = sample_losses(seen.problem, seen.weights)
        spread = every.std(dim=-1, correction=0, keepdim=True).clamp(min=1e-300)
        standard = (seen.exact - every.mean(dim=-1, keepdim=True)) / spread
        noise = torch.randn(seen.exact.shape, generator=seen.generator, dtype=torch.float64)
        return r * standard + math.sqrt(1 - r**2) * noise

    return score


def early_exit(features: int) -> Score:
    """Losses of the same weights on the first features alone: an exit of a linear model.

    Args:
        features: How many of the d features the exit sees, at least 1.

    Raises:
        ValueError: If it sees none.
    """
    if features < 1:
        raise ValueError(f"An exit must see at least one feature, got {features}.")

    def score(seen: Candidates) -> Tensor:
        cut = seen.weights.clone()
        cut[..., features:] = 0.0
        return sample_losses(seen.problem, cut, seen.index)

    return score


def run(
    given: Problem,
    *,
    eta: float,
    steps: int,
    seeds: int,
    generator: Generator,
    pool: int = 1,
    kept: int = 1,
    rule: Rule = "uniform",
    score: Score = exact_loss,
    schedule: Schedule | None = None,
) -> Run:
    r"""Train on S seeds at once: ``w <- w - eta * mean over the kept of weight_i grad f_i(w)``.

    ``greedy`` keeps the b largest scores, weights 1; ``unbiased`` draws b of the pool in proportion to the scores, with
    weights ``mean score / score_i``; ``uniform`` keeps the first b.

    Args:
        given: The problem.
        eta: Step size, positive.
        steps: K.
        seeds: S.
        generator: The only source of randomness.
        pool: R.
        kept: b.
        rule: How to choose.
        score: What to choose by.
        schedule: Step to the share of steps that select (`earlysift.schedules`); always if None.

    Returns:
        All iterates, and what was chosen.

    Raises:
        ValueError: If R < 1, b < 1, b > R, K < 1, S < 1 or eta is not positive.

    Example:
        >>> from earlysift.theory.problems import LOSSES, problem
        >>> p = problem("mean", torch.ones(2, 1), torch.tensor([1.0, 1.0]), LOSSES["squared"])
        >>> run(p, eta=0.5, steps=2, seeds=1, generator=torch.Generator()).iterates.flatten()
        tensor([0.0000, 0.5000, 0.7500], dtype=torch.float64)
    """
    check_pool(pool, kept)
    if not 0 < eta < math.inf or steps < 1 or seeds < 1:
        raise ValueError(f"Expected eta > 0, steps >= 1 and seeds >= 1, got {eta}, {steps} and {seeds}.")
    intensity = schedule or constant()
    w = given.start.repeat(seeds, 1)
    iterates = torch.empty(steps + 1, *w.shape, dtype=torch.float64)
    chosen = torch.empty(steps, seeds, kept, dtype=torch.int64)
    iterates[0] = w
    for k in range(steps):
        index = torch.randint(len(given.targets), (seeds, pool), generator=generator)
        shares = torch.full((seeds, kept), 1 / kept, dtype=torch.float64)
        places = torch.arange(kept).expand(seeds, kept)
        if rule != "uniform" and _selects(intensity(k), generator):
            scores = score(Candidates(given, w, index, sample_losses(given, w, index), generator))
            if rule == "greedy":
                places = scores.topk(kept, dim=1).indices
            else:
                scores = scores.clamp(min=1e-300)
                places = torch.multinomial(scores, kept, replacement=True, generator=generator)
                shares = scores.mean(dim=1, keepdim=True) / scores.gather(1, places) / kept
        chosen[k] = index.gather(1, places)
        w = w - eta * (shares.unsqueeze(-1) * sample_gradients(given, w, chosen[k])).sum(dim=1)
        iterates[k + 1] = w
    return Run(iterates, chosen)


def gradient_norms(seen: Candidates) -> Tensor:
    """Length of each candidate's gradient: the score for which the unbiased rule is best (T7)."""
    norms: Tensor = sample_gradients(seen.problem, seen.weights, seen.index).norm(dim=-1)
    return norms


def check_pool(pool: int, kept: int = 1) -> None:
    """Refuse a pool that nothing can be chosen from.

    Raises:
        ValueError: If R < 1, b < 1 or b > R.
    """
    if pool < 1:
        raise ValueError(f"A pool needs at least one candidate, got R = {pool}.")
    if not 1 <= kept <= pool:
        raise ValueError(f"Expected 1 <= b <= R, got b = {kept} of R = {pool}; enlarge the pool or keep fewer.")


@lru_cache(maxsize=64)
def rank_shares(samples: int, pool: int, kept: int = 1) -> Tensor:
    r"""How much of a greedy batch falls to the sample of each rank, largest score first.

    ``share_j = (E min(b, B_j) - E min(b, B_{j-1})) / b`` with ``B_j ~ Binomial(R, j / n)``, the number of candidates
    among the j first; for b = 1, ``((n - j + 1)^R - (n - j)^R) / n^R``.

    Args:
        samples: n.
        pool: R, drawn with replacement.
        kept: b.

    Returns:
        ``(n,)``, not rising, sum 1.

    Example:
        >>> rank_shares(2, 2)
        tensor([0.7500, 0.2500], dtype=torch.float64)
    """
    check_pool(pool, kept)
    chance = torch.arange(samples + 1, dtype=torch.float64) / samples
    counts = torch.arange(pool + 1, dtype=torch.float64)
    ways = (
        torch.lgamma(torch.tensor(pool + 1.0, dtype=torch.float64))
        - torch.lgamma(counts + 1)
        - torch.lgamma(pool - counts + 1)
    )
    log_mass = ways + torch.xlogy(counts, chance[:, None]) + torch.xlogy(pool - counts, 1 - chance[:, None])
    return (log_mass.exp() @ counts.clamp(max=kept)).diff() / kept


def expected_choice(values: Tensor, scores: Tensor, pool: int, kept: int = 1) -> Tensor:
    r"""Mean of a quantity over what greedy selection picks: exact, by ranks of the whole population.

    With values = scores = f(w) it is ``rho(w) F(w) = G(w)``; at w* it is M*.

    Args:
        values: Of every sample, ``(..., n)``.
        scores: Of every sample, ``(..., n)``.
        pool: R.
        kept: b.

    Returns:
        ``(...)``.

    Example:
        >>> f = torch.tensor([0.0, 4.0]).double()
        >>> expected_choice(f, f, pool=2)
        tensor(3., dtype=torch.float64)
    """
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    return values.expand(scores.shape).gather(-1, order) @ rank_shares(scores.size(-1), pool, kept)


def choice_shares(scores: Tensor, pool: int, kept: int = 1) -> Tensor:
    """Share of a greedy batch that falls to every sample: `rank_shares`, in the order of the samples ``(..., n)``."""
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    shares = rank_shares(scores.size(-1), pool, kept).expand(scores.shape)
    return torch.empty_like(shares).scatter(-1, order, shares)


def _worst(seen: Candidates, low: Tensor, high: Tensor) -> Tensor:
    """The scores between low and high whose argmax has the least exact loss."""
    eligible = high >= low.max(dim=1, keepdim=True).values
    victim = torch.where(eligible, seen.exact, math.inf).argmin(dim=1, keepdim=True)
    # Only the order matters, so a tie that the errors allow is broken against us by putting the victim on top.
    return low.scatter(1, victim, math.inf)


def _uniform(seen: Candidates) -> Tensor:
    return torch.rand(seen.exact.shape, generator=seen.generator, dtype=torch.float64)


def _selects(intensity: float, generator: Generator) -> bool:
    if intensity in (0.0, 1.0):  # most steps draw nothing
        return bool(intensity)
    return float(torch.rand((), generator=generator)) < intensity

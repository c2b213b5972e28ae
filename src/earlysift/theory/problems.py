r"""Convex problems with a known minimum.

``F(w) = mean over n samples of f_i(w)``, ``f_i(w) = loss(a_i . w, y_i) + ridge |w|^2 / 2``.
Letters of shapes: S seeds, n samples, d features, R candidates. Everything is float64 on the CPU.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor

PRECISION = 1e-11  # of the gradient at the minimum, relative to the one at the start
NEWTON_STEPS = 100
RIDGE = 0.01  # of logistic regressions
STEPS_AT_ONCE = 64  # a long run has more losses than should be in memory at once


class Loss(NamedTuple):
    """A loss of margin z and target y, elementwise and never negative, with its first two derivatives in z.

    ``max_curvature`` is the largest second derivative, infinite if the loss is not smooth; ``convex`` means in z.
    """

    value: Callable[[Tensor, Tensor], Tensor]
    slope: Callable[[Tensor, Tensor], Tensor]
    curvature: Callable[[Tensor, Tensor], Tensor]
    max_curvature: float
    convex: bool = True


LOSSES = {
    "squared": Loss(lambda z, y: (z - y).square() / 2, lambda z, y: z - y, lambda z, y: torch.ones(z.shape), 1.0),
    "logistic": Loss(
        lambda z, y: torch.nn.functional.softplus(-y * z),
        lambda z, y: -y * torch.sigmoid(-y * z),
        lambda z, y: torch.sigmoid(z) * torch.sigmoid(-z),
        0.25,
    ),
}


@dataclass(frozen=True)
class Problem:
    """Samples, a loss, and the minimiser of its mean.

    Shapes: features a_i ``(n, d)``, targets y_i ``(n,)`` (-1 or 1 for the logistic loss), start w_0 and optimum w*
    ``(d,)``.
    """

    name: str
    features: Tensor
    targets: Tensor
    loss: Loss
    ridge: float
    start: Tensor
    optimum: Tensor

    @property
    def smoothness(self) -> float:
        """L: every f_i is L-smooth."""
        return self.loss.max_curvature * self.features.square().sum(dim=1).max().item() + self.ridge

    @property
    def distance2(self) -> float:
        """D^2 = |w_0 - w*|^2."""
        return (self.start - self.optimum).square().sum().item()

    @property
    def minimum(self) -> float:
        """F* = F(w*)."""
        return self.objective(self.optimum).item()

    def margins(self, weights: Tensor, index: Tensor | None = None) -> Tensor:
        """a_i . w of all samples ``(..., n)``, or of samples ``(S, R)`` at weights ``(S, d)``: ``(S, R)``."""
        if index is None:
            return weights @ self.features.T
        return (self.features[index] @ weights.unsqueeze(-1)).squeeze(-1)

    def losses(self, weights: Tensor, index: Tensor | None = None) -> Tensor:
        """f_i(w) of all samples ``(..., n)``, or of samples ``(S, R)`` at weights ``(S, d)``: ``(S, R)``."""
        targets = self.targets if index is None else self.targets[index]
        penalty = self.ridge / 2 * weights.square().sum(dim=-1, keepdim=True)
        return self.loss.value(self.margins(weights, index), targets) + penalty

    def gradients(self, weights: Tensor, index: Tensor) -> Tensor:
        """Gradients of f_i at weights ``(S, d)`` for samples ``(S, b)``: ``(S, b, d)``."""
        slopes = self.loss.slope(self.margins(weights, index), self.targets[index])
        return slopes.unsqueeze(-1) * self.features[index] + self.ridge * weights.unsqueeze(-2)

    def objective(self, weights: Tensor) -> Tensor:
        """F(w), ``(...)`` for weights ``(..., d)``."""
        if weights.ndim < 3:
            return self.losses(weights).mean(dim=-1)
        return torch.cat([self.losses(part).mean(dim=-1) for part in torch.split(weights, STEPS_AT_ONCE)])

    def gradient(self, weights: Tensor, shares: Tensor | None = None) -> Tensor:
        """Gradient of ``sum_i shares_i f_i`` at ``(..., d)``; shares ``(..., n)`` sum to 1, None is 1/n each."""
        slopes = self.loss.slope(self.margins(weights), self.targets)
        weighted = slopes * (1 / len(self.targets) if shares is None else shares)
        return weighted @ self.features + self.ridge * weights

    def started_far(self, generator: Generator, distance: float = 5.0) -> "Problem":
        """The same problem, started at a distance from its minimum, in a random direction."""
        direction = normal(generator, *self.start.shape)
        return replace(self, start=self.optimum + distance * direction / direction.norm())


def normal(generator: Generator, *shape: int) -> Tensor:
    """Standard normal numbers."""
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def make_problem(name: str, features: Tensor, targets: Tensor, loss: Loss, *, ridge: float = 0.0) -> Problem:
    """A problem with its minimum: in closed form for the squared loss, by Newton's method to 1e-11 otherwise.

    All losses but the squared one need a ridge above 0: without it, separable classes have no minimum.
    """
    if features.ndim != 2 or targets.shape != features.shape[:1] or not len(targets):
        raise ValueError(f"Expected features (n, d) and targets (n,), got {[*features.shape]} and {[*targets.shape]}.")
    features, targets = features.double(), targets.double()
    if not bool(features.isfinite().all() and targets.isfinite().all()) or not 0 <= ridge < math.inf:
        raise ValueError(f"Expected finite features and targets and a ridge >= 0, got ridge = {ridge}; clean the data.")
    rules = [
        (not loss.convex, "the loss is not convex: a sample with a large loss need not lead downhill"),
        (not math.isfinite(loss.max_curvature), "the loss is not smooth: no L bounds its second derivative"),
    ]
    if reasons := [reason for broken, reason in rules if broken]:
        raise ValueError(f"The bounds need smooth convex losses, got {name}: {'; '.join(reasons)}.")
    start = torch.zeros(features.size(1), dtype=torch.float64)
    unsolved = Problem(name, features, targets, loss, ridge, start, start)
    return replace(unsolved, optimum=_minimiser(unsolved))


def synthetic(
    generator: Generator,
    *,
    name: str | None = None,
    kind: str = "squared",
    samples: int = 200,
    width: int = 10,
    condition: float = 10.0,
    noise: float = 1.0,
    tail: float = 0.0,
    spike: float = 0.0,
) -> Problem:
    r"""A random problem with a controlled condition number, noise and tail; its kind is one of `LOSSES`.

    One of the d = ``width`` features is constant, the others are Gaussian with standard deviations that fall
    geometrically to ``1 / sqrt(condition)``. The noise of a regression is ``noise * (exp(tail z) - mean)``, scaled to
    unit variance (z Gaussian; ``tail = 0`` is z itself), so a larger tail is heavier and more one-sided; without noise
    it interpolates. A share ``spike`` of its targets is raised by ten standard deviations. For the logistic loss,
    ``noise`` divides the margins from which labels are drawn.
    """
    if kind not in LOSSES:
        raise ValueError(f"Expected a kind among {sorted(LOSSES)}, got {kind!r}.")
    if samples < 1 or width < 1 or condition < 1 or noise < 0 or tail < 0 or not 0 <= spike < 1:
        raise ValueError(
            "Expected samples >= 1, width >= 1, condition >= 1, noise >= 0, tail >= 0 and a spike in [0, 1), got "
            f"{samples}, {width}, {condition}, {noise}, {tail} and {spike}."
        )
    scales = condition ** (-0.5 * torch.arange(width).double() / max(1, width - 1))
    features = scales * normal(generator, samples, width)
    features[:, 0] = 1.0
    margins = features @ (normal(generator, width) / scales) / math.sqrt(width)
    if kind == "logistic":
        chance = torch.sigmoid(margins / max(noise, 1e-6))
        uniform = torch.rand(samples, generator=generator, dtype=torch.float64)
        return make_problem(name or kind, features, torch.where(uniform < chance, 1.0, -1.0), LOSSES[kind], ridge=RIDGE)
    errors = normal(generator, samples)
    if tail:
        deviation = math.exp(tail**2 / 2) * math.sqrt(math.expm1(tail**2))
        errors = (torch.exp(tail * errors) - math.exp(tail**2 / 2)) / deviation
    moved = torch.rand(samples, generator=generator, dtype=torch.float64) < spike
    return make_problem(name or kind, features, margins + noise * errors + 10.0 * moved, LOSSES[kind])


BUNDLED = {"diabetes": "squared", "breast_cancer": "logistic", "wine": "logistic", "iris": "logistic"}


def bundled(name: str) -> Problem:
    """A data set of scikit-learn, standardised, with a constant feature; of the classes, the first against the rest."""
    if name not in BUNDLED:
        raise ValueError(f"Expected a data set among {', '.join(BUNDLED)}, got {name!r}.")
    try:
        data: Any = getattr(import_module("sklearn.datasets"), f"load_{name}")()
    except ImportError as error:
        raise ImportError(f"Real data sets need scikit-learn ({error}): pip install 'earlysift[data]'.") from error
    raw, targets = torch.as_tensor(data.data).double(), torch.as_tensor(data.target).double()
    standard = (raw - raw.mean(dim=0)) / raw.std(dim=0).clamp(min=1e-12)
    features = torch.cat([torch.ones(len(raw), 1).double(), standard], dim=1)
    if BUNDLED[name] == "squared":
        return make_problem(name, features, (targets - targets.mean()) / targets.std(), LOSSES["squared"])
    return make_problem(name, features, torch.where(targets == 0, 1.0, -1.0), LOSSES["logistic"], ridge=RIDGE)


def _minimiser(problem: Problem) -> Tensor:
    if problem.loss is LOSSES["squared"] and not problem.ridge:
        solution: Tensor = torch.linalg.lstsq(problem.features, problem.targets.unsqueeze(1), driver="gelsd").solution
        return solution.squeeze(1)
    if not problem.ridge:
        raise ValueError(f"The minimum of {problem.name} may lie at infinity (separable classes): give a ridge > 0.")
    n, width = problem.features.shape
    w = problem.start
    first = problem.gradient(w).norm().item()
    for _ in range(NEWTON_STEPS):
        gradient = problem.gradient(w)
        if gradient.norm().item() <= PRECISION * max(first, 1.0):
            return w
        curvature = problem.loss.curvature(problem.margins(w), problem.targets).double()
        hessian = (problem.features.T * (curvature / n)) @ problem.features + problem.ridge * torch.eye(width).double()
        step = torch.linalg.lstsq(hessian, gradient.unsqueeze(1), driver="gelsd").solution.squeeze(1)
        # Far from the minimum a full step may overshoot, so halve it until it descends. Next to the minimum, descent
        # is below the precision of the objective, so rounding is tolerated.
        size, before = 1.0, problem.objective(w).item()
        while problem.objective(w - size * step).item() > before + 1e-14 * max(1.0, before) and size > 1e-6:
            size /= 2
        w = w - size * step
    raise ValueError(f"The minimum of {problem.name} was not found; give a larger ridge than {problem.ridge:g}.")

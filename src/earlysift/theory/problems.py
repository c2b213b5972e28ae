r"""Problems whose minimum is known.

``F(w) = mean over n samples of f_i(w)``, ``f_i(w) = loss(a_i . w, y_i) + ridge |w|^2 / 2``.
Letters of shapes: S seeds, n samples, d features, R candidates. Everything is float64 on the CPU.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

import torch
from torch import Generator, Tensor

PRECISION = 1e-11  # of the gradient at the minimum, relative to that at the start
NEWTON_STEPS = 100
STEPS_AT_ONCE = 64  # of a run, where all losses along it are looked at


@dataclass(frozen=True)
class Loss:
    """A loss of a margin z and a target y, with what the statements ask of it.

    Attributes:
        value: (z, y) to the loss, elementwise, never negative.
        slope: (z, y) to the derivative in z.
        bend: (z, y) to the second derivative in z.
        curvature: The largest second derivative; infinite where the loss is not smooth.
        convex: Whether it is convex in z.
    """

    value: Callable[[Tensor, Tensor], Tensor]
    slope: Callable[[Tensor, Tensor], Tensor]
    bend: Callable[[Tensor, Tensor], Tensor]
    curvature: float
    convex: bool = True


def _sigmoid_bend(z: Tensor, y: Tensor) -> Tensor:
    s = torch.sigmoid(-y * z)
    return s * (1 - s) * (1 - 2 * s)


LOSSES = {
    "squared": Loss(lambda z, y: (z - y).square() / 2, lambda z, y: z - y, lambda z, y: torch.ones(z.shape), 1.0),
    "logistic": Loss(
        lambda z, y: torch.nn.functional.softplus(-y * z),
        lambda z, y: -y * torch.sigmoid(-y * z),
        lambda z, y: torch.sigmoid(z) * torch.sigmoid(-z),
        0.25,
    ),
    # What no bound here covers: a corner, and a loss that is not convex.
    "absolute": Loss(
        lambda z, y: (z - y).abs(), lambda z, y: (z - y).sign(), lambda z, y: torch.zeros(z.shape), math.inf
    ),
    "sigmoid": Loss(
        lambda z, y: torch.sigmoid(-y * z),
        lambda z, y: -y * torch.sigmoid(-y * z) * torch.sigmoid(y * z),
        _sigmoid_bend,
        0.1,
        convex=False,
    ),
}


@dataclass(frozen=True)
class Problem:
    """Samples, a loss, and where its mean is least.

    Attributes:
        name: What to call it.
        features: a_i, ``(n, d)``.
        targets: y_i, ``(n,)``; -1 or 1 for the logistic loss.
        loss: Of margin and target.
        ridge: Weight of |w|^2 / 2 in every sample's loss.
        start: w_0, ``(d,)``.
        optimum: w*, ``(d,)``; nan where there is no bound to hold against it.
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
        return self.loss.curvature * self.features.square().sum(dim=1).max().item() + self.ridge

    @property
    def distance2(self) -> float:
        """D^2 = |w_0 - w*|^2."""
        return (self.start - self.optimum).square().sum().item()


def problem(
    name: str, features: Tensor, targets: Tensor, loss: Loss, *, ridge: float = 0.0, start: Tensor | None = None
) -> Problem:
    """A problem with its minimum: in closed form for the squared loss, by Newton's method to 1e-11 for the others.

    Args:
        name: What to call it.
        features: ``(n, d)``.
        targets: ``(n,)``.
        loss: One of `LOSSES`, or a row of your own.
        ridge: At least 0, above 0 for all but the squared loss: separable classes have no minimum without.
        start: w_0 ``(d,)``; zero if None.

    Raises:
        ValueError: If shapes disagree, numbers are not finite, or the minimum is not found.

    Example:
        >>> p = problem("mean", torch.ones(3, 1), torch.tensor([1.0, 2.0, 6.0]), LOSSES["squared"])
        >>> round(p.optimum.item(), 9)
        3.0
    """
    if features.ndim != 2 or targets.shape != features.shape[:1] or not len(targets):
        raise ValueError(
            f"Expected features (n, d) and targets (n,), got {tuple(features.shape)} and {tuple(targets.shape)}."
        )
    features, targets = features.double(), targets.double()
    if not bool(features.isfinite().all() and targets.isfinite().all()) or not 0 <= ridge < math.inf:
        raise ValueError(f"Expected finite features and targets and a ridge >= 0, got ridge = {ridge}; clean the data.")
    start = torch.zeros(features.size(1), dtype=torch.float64) if start is None else start.double()
    made = Problem(name, features, targets, loss, ridge, start, torch.full_like(start, math.nan))
    return replace(made, optimum=_minimum(made)) if not refusals(made) else made


def refusals(given: Problem) -> list[str]:
    """Why the bounds do not cover a problem; empty if they do.

    Example:
        >>> refusals(problem("median", torch.ones(2, 1), torch.ones(2), LOSSES["absolute"]))
        ['the loss is not smooth: no L bounds its second derivative']
    """
    rules = [
        (not given.loss.convex, "the loss is not convex: a sample with a large loss need not lead downhill"),
        (not math.isfinite(given.loss.curvature), "the loss is not smooth: no L bounds its second derivative"),
    ]
    return [reason for refused, reason in rules if refused]


def require_smooth_convex(given: Problem) -> None:
    """Refuse a problem that the bounds do not cover, with every reason.

    Raises:
        ValueError: If it is not smooth or not convex.
    """
    if reasons := refusals(given):
        raise ValueError(
            f"The bounds need smooth convex losses, got {given.name}: {'; '.join(reasons)}. "
            f"Use the squared or the logistic loss."
        )


def synthetic(
    generator: Generator,
    *,
    kind: str = "squared",
    samples: int = 200,
    width: int = 10,
    condition: float = 10.0,
    noise: float = 1.0,
    tail: float = 0.0,
    ridge: float = 0.01,
    spike: float = 0.0,
) -> Problem:
    r"""A random problem with a controlled condition number, noise and tail.

    Features are Gaussian with standard deviations that fall geometrically to ``1 / sqrt(condition)``, besides a
    constant one. The noise of a regression is ``noise * (exp(tail z) - mean)``, scaled to unit variance (z Gaussian;
    ``tail = 0`` is z itself), so a larger tail is heavier and more one-sided; for the logistic loss, ``noise`` divides
    the margins from which labels are drawn.

    Args:
        generator: The only source of randomness.
        kind: ``squared`` or ``logistic``, or another of `LOSSES`.
        samples: n.
        width: d, the constant feature included.
        condition: Ratio of the largest to the smallest variance of a feature.
        noise: Standard deviation of the noise; 0 makes a regression interpolate.
        tail: From 0 (Gaussian) up.
        ridge: Of the logistic loss; a regression has none.
        spike: Share of the samples whose target is moved by ten standard deviations, all to one side.

    Example:
        >>> p = synthetic(torch.Generator().manual_seed(0), noise=0.0)
        >>> objective(p, p.optimum).item() < 1e-20
        True
    """
    if kind not in LOSSES:
        raise ValueError(f"Expected a kind among {sorted(LOSSES)}, got {kind!r}.")
    if samples < 1 or width < 1 or condition < 1 or noise < 0 or tail < 0 or not 0 <= spike < 1:
        raise ValueError(
            "Expected samples >= 1, width >= 1, condition >= 1, noise >= 0, tail >= 0 and a spike in [0, 1), got "
            f"{samples}, {width}, {condition}, {noise}, {tail} and {spike}."
        )
    scales = condition ** (-0.5 * torch.arange(width).double() / max(1, width - 1))
    features = scales * _normal(generator, samples, width)
    features[:, 0] = 1.0
    true = _normal(generator, width) / scales
    margins = features @ true / math.sqrt(width)
    if LOSSES[kind].curvature == 0.25 or not LOSSES[kind].convex:
        chance = torch.sigmoid(margins / max(noise, 1e-6))
        uniform = torch.rand(samples, generator=generator, dtype=torch.float64)
        return problem(kind, features, torch.where(uniform < chance, 1.0, -1.0), LOSSES[kind], ridge=ridge)
    z = _normal(generator, samples)
    errors = (torch.exp(tail * z) - math.exp(tail**2 / 2)) / _lognormal_deviation(tail) if tail else z
    moved = torch.rand(samples, generator=generator, dtype=torch.float64) < spike
    return problem(kind, features, margins + noise * errors + 10.0 * moved, LOSSES[kind])


BUNDLED = {"diabetes": "squared", "breast_cancer": "logistic", "wine": "logistic", "iris": "logistic"}


def bundled(name: str, *, ridge: float = 0.01) -> Problem:
    """One of scikit-learn's own data sets, standardised, with a constant feature.

    Args:
        name: One of `BUNDLED`; those of several classes ask for the first against the others.
        ridge: Of the logistic loss.

    Raises:
        ImportError: Without scikit-learn.
        ValueError: If the name is unknown.

    Example:
        >>> bundled("diabetes").features.shape
        torch.Size([442, 11])
    """
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
        return problem(name, features, (targets - targets.mean()) / targets.std(), LOSSES["squared"])
    return problem(name, features, torch.where(targets == 0, 1.0, -1.0), LOSSES["logistic"], ridge=ridge)


def margins(given: Problem, weights: Tensor, index: Tensor | None = None) -> Tensor:
    """a_i . w of all samples ``(..., n)``, or of those at ``index`` ``(S, R)`` for weights ``(S, d)``: ``(S, R)``."""
    if index is None:
        return weights @ given.features.T
    return (given.features[index] @ weights.unsqueeze(-1)).squeeze(-1)


def sample_losses(given: Problem, weights: Tensor, index: Tensor | None = None) -> Tensor:
    """f_i(w) of all samples ``(..., n)`` for weights ``(..., d)``, or of those at ``index`` ``(S, R)``: ``(S, R)``.

    Example:
        >>> p = problem("mean", torch.ones(2, 1), torch.tensor([0.0, 2.0]), LOSSES["squared"])
        >>> sample_losses(p, p.start)
        tensor([0., 2.], dtype=torch.float64)
    """
    targets = given.targets if index is None else given.targets[index]
    penalty = given.ridge / 2 * weights.square().sum(dim=-1, keepdim=True)
    return given.loss.value(margins(given, weights, index), targets) + penalty


def sample_gradients(given: Problem, weights: Tensor, index: Tensor) -> Tensor:
    """Gradients of f_i at weights ``(S, d)`` for samples ``(S, b)``: ``(S, b, d)``."""
    slopes = given.loss.slope(margins(given, weights, index), given.targets[index])
    return slopes.unsqueeze(-1) * given.features[index] + given.ridge * weights.unsqueeze(-2)


def objective(given: Problem, weights: Tensor) -> Tensor:
    """F(w), ``(...)`` for weights ``(..., d)``."""
    if weights.ndim < 3:
        return sample_losses(given, weights).mean(dim=-1)
    # A long run has more losses than memory should hold at once.
    return torch.cat([sample_losses(given, some).mean(dim=-1) for some in torch.split(weights, STEPS_AT_ONCE)])


def weighted_gradient(given: Problem, weights: Tensor, shares: Tensor | float) -> Tensor:
    """Gradient of sum_i shares_i f_i at weights ``(..., d)`` for shares ``(..., n)`` with sum 1: ``(..., d)``."""
    slopes = given.loss.slope(margins(given, weights), given.targets)
    return (shares * slopes) @ given.features + given.ridge * weights


def mean_gradient(given: Problem, weights: Tensor) -> Tensor:
    """Gradient of F at weights ``(..., d)``: ``(..., d)``."""
    return weighted_gradient(given, weights, 1 / len(given.targets))


def _minimum(given: Problem) -> Tensor:
    if given.loss is LOSSES["squared"] and not given.ridge:
        solution: Tensor = torch.linalg.lstsq(given.features, given.targets.unsqueeze(1), driver="gelsd").solution
        return solution.squeeze(1)
    if not given.ridge:
        raise ValueError(
            f"The minimum of {given.name} may lie at infinity, where classes can be separated: give a ridge > 0."
        )
    n, width = given.features.shape
    w = given.start.clone()
    first = mean_gradient(given, w).norm().item()
    for _ in range(NEWTON_STEPS):
        gradient = mean_gradient(given, w)
        if gradient.norm().item() <= PRECISION * max(first, 1.0):
            return w
        bends = given.loss.bend(margins(given, w), given.targets).double()
        hessian = (given.features.T * (bends / n)) @ given.features + given.ridge * torch.eye(width).double()
        step = torch.linalg.lstsq(hessian, gradient.unsqueeze(1), driver="gelsd").solution.squeeze(1)
        # Halve until it descends: far from the minimum a full step may overshoot. Next to it the objective has no
        # digits left to fall in, so rounding is forgiven.
        size, before = 1.0, objective(given, w).item()
        while objective(given, w - size * step).item() > before + 1e-14 * max(1.0, before) and size > 1e-6:
            size /= 2
        w = w - size * step
    raise ValueError(f"The minimum of {given.name} was not found; a larger ridge than {given.ridge:g} makes it easier.")


def _lognormal_deviation(tail: float) -> float:
    return math.exp(tail**2 / 2) * math.sqrt(math.expm1(tail**2))


def _normal(generator: Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)

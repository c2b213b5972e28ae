r"""The statements in closed form: T1 to T3, T6, and T7 for pools (T5, T7, C1 and C2 are in `earlysift.costs`).

Notation: f convex, L-smooth (``smoothness``) and not negative; ``eta`` the step size, K ``steps``, ``distance2`` D^2 =
|w_0 - w*|^2; R candidates (``pool``) of which b are kept (``kept``); ``gain`` rho, a lower bound on the selection gain
wherever the run goes; ``floor`` M* = E[mean loss at w* of the b candidates that are hardest there], at least
``minimum`` F* = F(w*). Bounds are in units of the loss.

Every statement is derived for this project, after Das, Chen, Ieong, Bansal and Sanghavi, Understanding the Training
Speedup from Sampling with Approximate Losses, ICML 2024, arXiv 2402.07052, of which only the abstract was at hand.
Proofs, and what is the paper's: docs/theory.md.
"""

import math

import torch
from torch import Tensor

GRID = 8.0, 500  # reach in standard deviations, and cells, of the integrals over pairs of Gaussians
LEAST_ANGLE = 0.1  # smallest arccos of the correlation at which the grid resolves the density of a pair


def greedy_bound(distance2: float, steps: int, eta: float, smoothness: float, floor: float, gain: float = 1.0) -> float:
    r"""Bound on the objective at the mean iterate of greedy SGD (T1); with ``rho = 1`` and ``M* = F*``, of SGD (T2).

    ``E F(mean w) <= (D^2 / (2 eta K) + M*) / (rho (1 - L eta))``
    """
    _require_range(distance2, steps, eta, smoothness, floor, gain)
    return (distance2 / (2 * eta * steps) + floor) / (gain * (1 - smoothness * eta))


def sharp_bound(distance2: float, steps: int, eta: float, smoothness: float, floor: float, gain: float = 1.0) -> float:
    r"""T1 and T2 without the loss of step size in the transient (T1+, T2+).

    ``E F(mean w) <= (D^2 / (2 eta K) + M* / (1 - L eta)) / rho``. It holds with any point u in place of w* (D^2 =
    |w_0 - u|^2, M* = G(u)), so u = argmin G gives the lowest floor.
    """
    _require_range(distance2, steps, eta, smoothness, floor, gain)
    return (distance2 / (2 * eta * steps) + floor / (1 - smoothness * eta)) / gain


def multiplicative_gain(gain: float, d: float) -> float:
    """Least gain of scores with ``(1 - d) f <= g <= (1 + d) f``: ``rho (1 - d) / (1 + d)`` (T3)."""
    if not 0 <= d < 1:
        raise ValueError(f"The multiplicative error d must be in [0, 1), got {d}: at 1 a score may be zero anywhere.")
    return gain * (1 - d) / (1 + d)


def crossing_step(distance2: float, eta: float, gain: float, floor: float, minimum: float) -> float:
    r"""Number of steps after which the bound of SGD is below that of greedy SGD: where T1 and T2 are equal.

    ``K = D^2 (rho - 1) / (2 eta (M* - rho F*))``; infinity if ``M* <= rho F*``, as in interpolation, and 0 if rho <= 1.
    """
    excess = floor - gain * minimum
    return max(0.0, distance2 * (gain - 1) / (2 * eta * excess)) if excess > 0 else math.inf


def pool_second_moment(population: float, pool: int) -> float:
    """Share of the gradient's second moment that is left by the unbiased rule within pools of R (T7 for pools).

    ``V_R = V + (1 - V) / R``, V = ``population`` from `earlysift.costs.second_moment_ratio` of all samples.
    """
    return population + (1 - population) / pool


def normal_choice(pool: int, kept: int = 1) -> float:
    r"""Mean of the b largest of R standard normals: T5 multiplies the standard deviation of the losses by it.

    ``e(R, b) = (R / b) * integral of z phi(z) P(Bin(R - 1, 1 - Phi(z)) < b)``; ``e(2, 1) = 1 / sqrt(pi)``.
    """
    require_pool(pool, kept)
    z = torch.linspace(-12, 12, 4801, dtype=torch.float64)
    above = torch.special.ndtr(-z)[:, None]
    counts = torch.arange(kept, dtype=torch.float64)
    ways = math.lgamma(pool) - torch.lgamma(counts + 1) - torch.lgamma(pool - counts)
    log_mass = ways + torch.xlogy(counts, above) + torch.xlogy(pool - 1 - counts, 1 - above)
    return torch.trapezoid(z * _phi(z) * log_mass.exp().sum(dim=1), z).item() * pool / kept


def agreement(correlation: float, pool: int, *, squares: bool = False) -> float:
    r"""P(argmax g = argmax f) of R independent jointly Gaussian pairs (T6), or P(argmax g^2 = argmax f^2) (ours).

    ``R * integral of phi_2(x, y; r) Phi_2(x, y; r)^(R - 1)``. For R = 2, ``1/2 + arcsin(r) / pi`` (Sheppard, 1899); of
    squares, ``1/2 + 2 (arcsin(r) / pi)^2``: a score that is exactly the negative ranks just as well. Squares are exact
    for the squared error of a linear network with one output and Gaussian inputs; r is that before squaring.

    Returns:
        A probability, to about 1e-4.

    Example:
        >>> round(agreement(0.5, 2), 9) == round(2 / 3, 9), round(agreement(0.0, 5), 4)
        (True, 0.2)
        >>> agreement(-1.0, 8, squares=True)
        1.0
    """
    require_correlation(correlation)
    require_pool(pool)
    if pool == 1:
        return 1.0
    if pool == 2:
        turn = math.asin(correlation) / math.pi
        return 0.5 + (2 * turn**2 if squares else turn)
    angle = math.acos(abs(correlation))
    if angle >= LEAST_ANGLE:
        return _agreement_integral(correlation, pool, squares)
    # Next to |r| = 1 the grid is too coarse: a parabola in the angle, from the known value at angle 0.
    limit = 1.0 if squares else float(correlation > 0)
    one, two = (
        _agreement_integral(math.copysign(math.cos(times * LEAST_ANGLE), correlation), pool, squares) - limit
        for times in (1, 2)
    )
    x = angle / LEAST_ANGLE
    return limit + x * (2 * one - two / 2) + x**2 * (two / 2 - one)


def kept_overlap(correlation: float, keep: float) -> float:
    r"""Share of the kept set that exact losses would also keep, in large pools of jointly Gaussian pairs (T6, ours).

    ``P(f > z, g > z) / keep``, z the (1 - keep) quantile; at keep 1/2 it is ``1/2 + arcsin(r) / pi``, T6 itself.
    """
    require_correlation(correlation)
    if not 0 < keep <= 1:
        raise ValueError(f"keep must be in (0, 1], got {keep}.")
    z = max(-14.0, -torch.special.ndtri(torch.tensor(keep, dtype=torch.float64)).item())
    u = torch.linspace(z, max(0.0, z) + 14, 8001, dtype=torch.float64)
    inner = torch.special.ndtr((correlation * u - z) / math.sqrt(max(1 - correlation**2, 1e-12)))
    return torch.trapezoid(_phi(u) * inner, u).item() / keep


def require_pool(pool: int, kept: int = 1) -> None:
    """Raise ValueError if R < 1, b < 1 or b > R."""
    if pool < 1:
        raise ValueError(f"A pool needs at least one candidate, got R = {pool}.")
    if not 1 <= kept <= pool:
        raise ValueError(f"Expected 1 <= b <= R, got b = {kept} of R = {pool}; enlarge the pool or keep fewer.")


def require_correlation(r: float) -> None:
    """Raise ValueError if r is outside [-1, 1]."""
    if not -1 <= r <= 1:
        raise ValueError(f"A correlation must be in [-1, 1], got {r}.")


def _require_range(distance2: float, steps: int, eta: float, smoothness: float, floor: float, gain: float) -> None:
    rules = [
        (not 0 < smoothness < math.inf, f"The bound needs a finite smoothness L > 0, got {smoothness}."),
        (not 0 < eta * smoothness < 1, f"Expected 0 < eta < 1 / L, got L eta = {eta * smoothness:.4g}; lower eta."),
        (not 0 <= distance2 < math.inf, f"D^2 must be finite and at least 0, got {distance2}."),
        (steps < 1, f"K must be at least 1, got {steps}."),
        (not 0 <= floor < math.inf, f"The floor must be finite and at least 0, got {floor}."),
        (not 0 < gain < math.inf, f"The gain rho must be positive, got {gain}."),
    ]
    if messages := [message for broken, message in rules if broken]:
        raise ValueError(" ".join(messages))


def _phi(z: Tensor) -> Tensor:
    return torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi)


def _agreement_integral(r: float, pool: int, squares: bool) -> float:
    """The integral of `agreement` on a grid; for squares, over the density of (|f|, |g|)."""
    reach, cells = GRID
    edges = torch.linspace(0.0 if squares else -reach, reach, cells + 1, dtype=torch.float64)
    z = (edges[1:] + edges[:-1]) / 2

    def density(y: Tensor) -> Tensor:
        x = z[:, None]
        return torch.exp(-(x.square() - 2 * r * x * y + y.square()) / (2 * (1 - r**2)))

    mass = density(z[None]) + density(-z[None]) if squares else density(z[None])
    mass = mass / mass.sum()
    corners = torch.nn.functional.pad(mass, (1, 0, 1, 0)).cumsum(0).cumsum(1)
    below = (corners[1:, 1:] + corners[1:, :-1] + corners[:-1, 1:] + corners[:-1, :-1]) / 4
    return (mass * pool * below ** (pool - 1)).sum().item()

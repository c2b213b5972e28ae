r"""The statements in closed form: T1 to T4, T6 and what sharpens them (T5, T7, C1 and C2 are in `earlysift.costs`).

Notation: f convex, L-smooth, not negative; eta the step size, K steps, D = |w_0 - w*|; R candidates of which b are
kept; rho the selection gain, M* = E[mean loss at w* of the b candidates that are hardest there] >= F* = F(w*). Proofs,
and what is the paper's: docs/theory.md. Every statement is derived for this project, after Das, Chen, Ieong, Bansal and
Sanghavi, Understanding the Training Speedup from Sampling with Approximate Losses, ICML 2024, arXiv 2402.07052, of
which the abstract was at hand.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from earlysift.theory.runs import check_pool

GRID = 8.0, 500  # reach in standard deviations and cells of the integrals over Gaussians
LEAST_ANGLE = 0.1  # arccos of the correlation down to which the grid resolves the density of a pair


def greedy_bound(distance2: float, steps: int, eta: float, smoothness: float, floor: float, gain: float) -> float:
    r"""What greedy SGD promises for its mean iterate (T1).

    ``E F(mean w) <= (D^2 / (2 eta K) + M*) / (rho (1 - L eta))``

    Args:
        distance2: D^2.
        steps: K.
        eta: In (0, 1 / L).
        smoothness: L.
        floor: M*, in units of the loss.
        gain: rho, a lower bound on the gain wherever the run goes.

    Returns:
        In units of the loss.

    Raises:
        ValueError: If eta is outside (0, 1 / L), or another number is out of range.

    Example:
        >>> greedy_bound(1.0, 100, 0.5, 1.0, floor=0.0, gain=2.0)
        0.01
    """
    _check(distance2, steps, eta, smoothness, floor, gain)
    return (distance2 / (2 * eta * steps) + floor) / (gain * (1 - smoothness * eta))


def uniform_bound(distance2: float, steps: int, eta: float, smoothness: float, minimum: float) -> float:
    """What SGD promises for its mean iterate (T2): `greedy_bound` with ``rho = 1`` and ``M* = F*``.

    Example:
        >>> uniform_bound(1.0, 100, 0.5, 1.0, minimum=0.0)
        0.02
    """
    return greedy_bound(distance2, steps, eta, smoothness, minimum, 1.0)


def sharp_bound(distance2: float, steps: int, eta: float, smoothness: float, floor: float, gain: float = 1.0) -> float:
    r"""T1 and T2 without the loss of step size in the transient (T1+, T2+).

    ``E F(mean w) <= (D^2 / (2 eta K) + M* / (1 - L eta)) / rho``, for uniform SGD with M* = F* and rho = 1. Holds with
    any point u in the place of w* (D^2 = |w_0 - u|^2, M* = G(u)), so the lowest floor is that of u = argmin G.

    Args:
        distance2: D^2.
        steps: K.
        eta: In (0, 1 / L).
        smoothness: L.
        floor: M*, or G(u).
        gain: rho.

    Example:
        >>> sharp_bound(1.0, 100, 0.5, 1.0, floor=0.0, gain=2.0)
        0.005
    """
    _check(distance2, steps, eta, smoothness, floor, gain)
    return (distance2 / (2 * eta * steps) + floor / (1 - smoothness * eta)) / gain


def interpolation_bound(distance2: float, steps: int, eta: float, smoothness: float, gain: float = 1.0) -> float:
    r"""Where all samples can be fitted (M* = 0), for steps up to twice as long (T1+).

    ``E F(mean w) <= D^2 / (2 eta K rho min(1, 2 - L eta))``

    Args:
        distance2: D^2.
        steps: K.
        eta: In (0, 2 / L).
        smoothness: L.
        gain: rho.

    Raises:
        ValueError: If eta is outside (0, 2 / L).

    Example:
        >>> interpolation_bound(1.0, 100, 1.0, 1.0)
        0.005
    """
    _check(distance2, steps, eta / 2, smoothness, 0.0, gain)
    return distance2 / (2 * eta * steps * gain * min(1.0, 2 - smoothness * eta))


def multiplicative_gain(gain: float, d: float) -> float:
    """Least gain of scores within a factor of the loss, ``(1 - d) f <= g <= (1 + d) f`` (T3).

    ``rho_d >= rho (1 - d) / (1 + d)``

    Args:
        gain: rho of the exact loss.
        d: In [0, 1).

    Raises:
        ValueError: If d is outside [0, 1).

    Example:
        >>> multiplicative_gain(3.0, 0.5)
        1.0
    """
    if not 0 <= d < 1:
        raise ValueError(f"The multiplicative error d must be in [0, 1), got {d}: at 1 a score may be zero anywhere.")
    return gain * (1 - d) / (1 + d)


def additive_choice(choice: float, e: float) -> float:
    """Least expected loss of what is chosen by scores within a distance of the loss, ``|g - f| <= e`` (T4).

    ``E f(x_i*) >= E max f - 2 e``; so the bounds above hold with ``2 e / (rho (1 - L eta))`` added (T1), or
    ``2 e / rho`` (T1+).

    Args:
        choice: E max f, or ``rho F``, in units of the loss.
        e: At least 0.

    Raises:
        ValueError: If e is negative.

    Example:
        >>> additive_choice(3.0, 0.5)
        2.0
    """
    if not 0 <= e < math.inf:
        raise ValueError(f"The additive error e must be finite and at least 0, got {e}.")
    return choice - 2 * e


def crossing_step(distance2: float, eta: float, gain: float, floor: float, minimum: float) -> float:
    r"""Number of steps from which on SGD promises more than greedy SGD: where T1 and T2 are equal.

    ``K = D^2 (rho - 1) / (2 eta (M* - rho F*))``; never (infinity) if ``M* <= rho F*``, as in interpolation, and from
    the first step (0) if rho <= 1.

    Args:
        distance2: D^2.
        eta: Positive.
        gain: rho.
        floor: M*.
        minimum: F*.

    Example:
        >>> crossing_step(1.0, 0.01, gain=2.0, floor=3.0, minimum=1.0)
        50.0
    """
    excess = floor - gain * minimum
    if excess <= 0:
        return math.inf
    return max(0.0, distance2 * (gain - 1) / (2 * eta * excess))


def unbiased_bound(
    distance2: float, steps: int, eta: float, smoothness: float, minimum: float, second_moment: float
) -> float:
    r"""What the unbiased rule promises: uniform SGD on a problem that is smoother by V, with no floor of its own (T7+).

    ``E F(mean w) <= (D^2 / (2 eta K) + F*) / (1 - V L eta)``, for eta up to ``1 / (V L)``.

    Args:
        distance2: D^2.
        steps: K.
        eta: In (0, 1 / (V L)).
        smoothness: L.
        minimum: F*.
        second_moment: V in (0, 1], the largest `pool_second_moment` wherever the run goes.

    Example:
        >>> unbiased_bound(1.0, 100, 1.0, 1.0, minimum=0.0, second_moment=0.5)
        0.01
    """
    return uniform_bound(distance2, steps, eta, smoothness * second_moment, minimum)


def pool_second_moment(population: float, pool: int) -> float:
    """What the unbiased rule leaves of the gradient's second moment when it draws within pools of R (T7 for pools).

    ``V_R = V + (1 - V) / R``: a pool of one leaves all of it, a large pool what `earlysift.costs.second_moment_ratio`
    of the population says.

    Args:
        population: V of the population.
        pool: R.

    Example:
        >>> pool_second_moment(0.5, 4)
        0.625
    """
    check_pool(pool)
    return population + (1 - population) / pool


def switch_level(gain: float, floor: float, minimum: float, eta: float, smoothness: float) -> float:
    r"""Objective down to which a greedy step is guaranteed more than a uniform one: the switch-off level (T8).

    ``F_off = (M* - F*) / ((rho - 1) (1 - L eta))``: above it the guaranteed decrease of ``|w - w*|^2`` is larger for
    greedy. Infinite where greedy gains nothing (rho <= 1).

    Args:
        gain: rho.
        floor: M*.
        minimum: F*.
        eta: In (0, 1 / L).
        smoothness: L.

    Example:
        >>> switch_level(2.0, 1.5, 1.0, eta=0.5, smoothness=1.0)
        1.0
    """
    _check(0.0, 1, eta, smoothness, floor, max(gain, 1.0))
    return math.inf if gain <= 1 else (floor - minimum) / ((gain - 1) * (1 - smoothness * eta))


def annealed_bound(distance2: float, steps: int, eta: float, smoothness: float, minimum: float, noise: float) -> float:
    r"""What the uniform end of an annealed run promises: F* is reached, greedy only shortens the way (T9).

    ``E F(mean w) <= F* + E|w_t - w*|^2 / (2 eta K) + eta sigma*^2 / (2 (1 - L eta))`` over the K uniform steps behind
    the switch at step t; with t = 0 it is T2 in its sharpest form.

    Args:
        distance2: E|w_t - w*|^2 at the switch.
        steps: K uniform steps.
        eta: In (0, 1 / L).
        smoothness: L.
        minimum: F*.
        noise: sigma*^2 = E |grad f_i(w*)|^2.

    Example:
        >>> annealed_bound(1.0, 100, 0.5, 1.0, minimum=2.0, noise=0.0)
        2.01
    """
    _check(distance2, steps, eta, smoothness, minimum, 1.0)
    return minimum + distance2 / (2 * eta * steps) + eta * noise / (2 * (1 - smoothness * eta))


def normal_choice(pool: int, kept: int = 1) -> float:
    r"""Mean of the b largest of R standard normals: what T5 multiplies the standard deviation of the losses by.

    ``e(R, b) = (R / b) * integral of z phi(z) P(Bin(R - 1, 1 - Phi(z)) < b)``, at most `normal_tail` of b / R.

    Args:
        pool: R.
        kept: b.

    Example:
        >>> round(normal_choice(2), 6) == round(1 / math.pi**0.5, 6)
        True
    """
    z = torch.linspace(-12, 12, 4801, dtype=torch.float64)
    return _mean_of_best(z, z, _phi(z), torch.special.ndtr(-z), pool, kept)


def gaussian_gain(pool: int, kept: int = 1) -> float:
    r"""Gain of exact losses in least squares on Gaussian data, at every w (T10).

    ``rho = E[mean of the b largest of R chi-squares]``

    There f is F times a chi-square of one degree of freedom at every w, so ``G = rho F``, ``grad G = rho grad F``, and
    greedy SGD has no floor but that of its noise.

    Args:
        pool: R.
        kept: b.

    Example:
        >>> round(gaussian_gain(1), 6), round(gaussian_gain(2), 4) == round(1 + 2 / math.pi, 4)
        (1.0, True)
    """
    z = torch.linspace(0, 12, 4801, dtype=torch.float64)
    return _mean_of_best(z.square(), z, 2 * _phi(z), 2 * torch.special.ndtr(-z), pool, kept)


def normal_tail(keep: float) -> float:
    r"""Mean of the upper share ``keep`` of a standard normal: T5 for large pools.

    ``h(keep) = phi(z) / keep``, z the (1 - keep) quantile.

    Args:
        keep: b / R in (0, 1].

    Example:
        >>> round(normal_tail(0.5), 3)
        0.798
    """
    if not 0 < keep <= 1:
        raise ValueError(f"keep must be in (0, 1], got {keep}.")
    z = -torch.special.ndtri(torch.tensor(keep, dtype=torch.float64))
    return _phi(z).item() / keep


def agreement(correlation: float, pool: int) -> float:
    r"""P(argmax g = argmax f) of R independent pairs that are jointly Gaussian (T6).

    ``R * integral of phi_2(x, y; r) Phi_2(x, y; r)^(R - 1)``; for R = 2, ``1/2 + arcsin(r) / pi`` (Sheppard, 1899).

    Args:
        correlation: r in [-1, 1].
        pool: R.

    Returns:
        A probability, to about 1e-4.

    Raises:
        ValueError: If |r| > 1 or R < 1.

    Example:
        >>> round(agreement(0.5, 2), 9) == round(2 / 3, 9)
        True
        >>> round(agreement(0.0, 5), 4)
        0.2
    """
    r = _correlation(correlation)
    check_pool(pool)
    if pool == 1:
        return 1.0
    if pool == 2:
        return 0.5 + math.asin(r) / math.pi
    reach, cells = GRID
    z = _centres(-reach, reach, cells)
    return _by_angle(r, float(r > 0), lambda r: _agreement(_pair_density(z, z, r), pool))


def agreement_of_squares(correlation: float, pool: int) -> float:
    r"""P(argmax v^2 = argmax u^2) of R independent jointly Gaussian pairs (u, v) (T6 for squared errors, ours).

    For R = 2, ``1/2 + 2 (arcsin(s) / pi)^2``: a score that is exactly the negative ranks just as well. It is exact for
    the squared error of a linear network with one output and Gaussian inputs.

    Args:
        correlation: s in [-1, 1], of u and v before they are squared.
        pool: R.

    Example:
        >>> agreement_of_squares(-1.0, 8)
        1.0
        >>> round(agreement_of_squares(0.5, 2), 4)
        0.5556
    """
    s = _correlation(correlation)
    check_pool(pool)
    if pool == 1:
        return 1.0
    if pool == 2:
        return 0.5 + 2 * (math.asin(s) / math.pi) ** 2
    reach, cells = GRID
    z = _centres(0.0, reach, cells)
    return _by_angle(s, 1.0, lambda s: _agreement(_pair_density(z, z, s) + _pair_density(z, -z, s), pool))


def kept_overlap(correlation: float, keep: float) -> float:
    r"""Share of the kept set that exact losses would keep, too, in large pools of jointly Gaussian pairs (T6, ours).

    ``P(f > z, g > z) / keep``, z the (1 - keep) quantile; at keep 1/2 it is ``1/2 + arcsin(r) / pi``, T6 itself.

    Args:
        correlation: r in [-1, 1].
        keep: b / R in (0, 1].

    Example:
        >>> round(kept_overlap(0.5, 0.5), 4)
        0.6667
    """
    r = _correlation(correlation)
    if not 0 < keep <= 1:
        raise ValueError(f"keep must be in (0, 1], got {keep}.")
    if r == 1 or keep == 1:
        return 1.0
    if r == -1:
        return max(0.0, 2 - 1 / keep)
    z = -torch.special.ndtri(torch.tensor(keep, dtype=torch.float64)).item()
    u = torch.linspace(z, z + 14, 8001, dtype=torch.float64)
    inner = torch.special.ndtr((r * u - z) / math.sqrt(1 - r**2))
    return torch.trapezoid(_phi(u) * inner, u).item() / keep


def _check(distance2: float, steps: int, eta: float, smoothness: float, floor: float, gain: float) -> None:
    if not 0 < eta * smoothness < 1:
        raise ValueError(
            f"The bound needs 0 < eta < 1 / L, got L eta = {eta * smoothness:.4g}; take eta = {0.5 / smoothness:.3g}."
            if smoothness > 0 and math.isfinite(smoothness)
            else f"The bound needs a finite smoothness L > 0, got {smoothness}."
        )
    rules = [
        (not 0 <= distance2 < math.inf, f"D^2 must be finite and at least 0, got {distance2}."),
        (steps < 1, f"K must be at least 1, got {steps}."),
        (not 0 <= floor < math.inf, f"The floor must be finite and at least 0, got {floor}."),
        (not 0 < gain < math.inf, f"The gain rho must be positive, got {gain}."),
    ]
    if problems := [message for bad, message in rules if bad]:
        raise ValueError(" ".join(problems))


def _correlation(r: float) -> float:
    if not -1 <= r <= 1:
        raise ValueError(f"A correlation must be in [-1, 1], got {r}.")
    return r


def _by_angle(r: float, limit: float, integral: Callable[[float], float]) -> float:
    """An integral over pairs with correlation r; next to |r| = 1, a parabola in the angle from what it is there."""
    angle = math.acos(abs(r))
    if angle >= LEAST_ANGLE:
        return integral(r)
    one, two = (integral(math.copysign(math.cos(times * LEAST_ANGLE), r)) - limit for times in (1, 2))
    x = angle / LEAST_ANGLE
    return limit + x * (2 * one - two / 2) + x**2 * (two / 2 - one)


def _phi(z: Tensor) -> Tensor:
    return torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi)


def _mean_of_best(value: Tensor, z: Tensor, density: Tensor, above: Tensor, pool: int, kept: int) -> float:
    """Mean value of the b largest of R draws: each draw counts where fewer than b of the others are above it."""
    check_pool(pool, kept)
    counts = torch.arange(kept, dtype=torch.float64)
    ways = math.lgamma(pool) - torch.lgamma(counts + 1) - torch.lgamma(pool - counts)
    log_mass = ways + torch.xlogy(counts, above[:, None]) + torch.xlogy(pool - 1 - counts, 1 - above[:, None])
    return torch.trapezoid(value * density * log_mass.exp().sum(dim=1), z).item() * pool / kept


def _centres(low: float, high: float, cells: int) -> Tensor:
    edges = torch.linspace(low, high, cells + 1, dtype=torch.float64)
    return (edges[1:] + edges[:-1]) / 2


def _pair_density(x: Tensor, y: Tensor, r: float) -> Tensor:
    """Density of a standard Gaussian pair with correlation r on a grid, up to a constant."""
    x, y = x[:, None], y[None]
    return torch.exp(-(x.square() - 2 * r * x * y + y.square()) / (2 * (1 - r**2)))


def _agreement(density: Tensor, pool: int) -> float:
    mass = density / density.sum()
    corners = torch.nn.functional.pad(mass, (1, 0, 1, 0)).cumsum(0).cumsum(1)
    below = (corners[1:, 1:] + corners[1:, :-1] + corners[:-1, 1:] + corners[:-1, :-1]) / 4
    return (mass * pool * below ** (pool - 1)).sum().item()

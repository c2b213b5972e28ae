r"""Early exit in deep linear networks: how often a shallow exit keeps the sample with the largest loss.

A network of L square layers maps x to ``H W_L ... W_1 x``; the loss is half the squared distance to a teacher's output
``T x``, the inputs are Gaussian. An exit at depth k puts the model's own head on layer k: ``H W_k ... W_1 x``. So the
error of every exit is one matrix times x, and what its loss has in common with the exact one follows in closed form.

Letters of shapes: o outputs, d width, R candidates, b kept.
"""

import math
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from earlysift.theory.runs import check_pool


class Agreement(NamedTuple):
    """Monte Carlo over pools: shares and their standard errors."""

    argmax: float
    """Share of pools in which the exit picks the sample with the largest loss."""
    argmax_error: float
    overlap: float
    """Mean share of the b kept that exact losses would keep, too."""
    overlap_error: float


def exit_errors(generator: Generator, *, depth: int, width: int, spread: float, outputs: int = 1) -> Tensor:
    r"""Error maps ``H W_k ... W_1 - T`` of a random network at every exit k = 0 ... L.

    Every layer is ``Q diag(exp(spread z)) Q^T``, Q a random rotation and z standard normal: at spread 0 it passes its
    input on, and the larger the spread of its singular values, the more it turns what it is given.

    Args:
        generator: The only source of randomness.
        depth: L.
        width: d.
        spread: Standard deviation of the logarithm of the singular values.
        outputs: o.

    Returns:
        ``(L + 1, o, d)``; the last is the error of the whole network.

    Raises:
        ValueError: If a size is below 1 or the spread negative.

    Example:
        >>> maps = exit_errors(torch.Generator().manual_seed(0), depth=3, width=4, spread=0.0)
        >>> bool(torch.allclose(maps[0], maps[3]))
        True
    """
    if depth < 1 or width < 1 or outputs < 1 or not 0 <= spread < math.inf:
        raise ValueError(
            f"Expected depth, width and outputs >= 1 and spread >= 0, got {depth}, {width}, {outputs} and {spread}."
        )

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    head, teacher = normal(outputs, width), normal(outputs, width)
    product = torch.eye(width, dtype=torch.float64)
    maps = [head - teacher]
    for _ in range(depth):
        rotation = torch.linalg.qr(normal(width, width)).Q
        product = (rotation * torch.exp(spread * normal(width))) @ rotation.T @ product
        maps.append(head @ product - teacher)
    return torch.stack(maps)


def direction_correlation(errors: Tensor, exact: Tensor) -> float:
    """Correlation s of two single outputs' errors before they are squared: the cosine of their maps ``(1, d)``.

    Example:
        >>> direction_correlation(torch.tensor([[1.0, 0.0]]), torch.tensor([[-2.0, 0.0]]))
        -1.0
    """
    cosine = (errors * exact).sum() / (errors.norm() * exact.norm())
    return float(cosine.clamp(-1, 1))


def loss_correlation(errors: Tensor, exact: Tensor) -> float:
    r"""Correlation r of the losses ``|A x|^2`` and ``|B x|^2`` for Gaussian x.

    ``r = tr(A A^T B B^T)``-like: ``|A B^T|^2 / (|A A^T| |B B^T|)`` in Frobenius norms.

    Args:
        errors: A, ``(o, d)``.
        exact: B, ``(o, d)``.

    Example:
        >>> loss_correlation(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]))
        0.0
    """
    shared = (errors @ exact.T).square().sum()
    return float((shared / ((errors @ errors.T).norm() * (exact @ exact.T).norm())).clamp(-1, 1))


def measure_agreement(
    errors: Tensor, exact: Tensor, pool: int, kept: int, pools: int, generator: Generator
) -> Agreement:
    """How often an exit keeps the true argmax, and how much of the kept set, by Monte Carlo.

    Args:
        errors: Map of the exit, ``(o, d)``.
        exact: Map of the whole network, ``(o, d)``.
        pool: R.
        kept: b.
        pools: How many pools to draw.
        generator: The only source of randomness.

    Example:
        >>> same = torch.ones(1, 2, dtype=torch.float64)
        >>> measure_agreement(same, same, 4, 2, 10, torch.Generator().manual_seed(0)).overlap
        1.0
    """
    check_pool(pool, kept)
    inputs = torch.randn(pools, pool, exact.size(1), generator=generator, dtype=torch.float64)
    score, loss = ((inputs @ map_.T).square().sum(dim=-1) for map_ in (errors, exact))
    return agreement_of(score, loss, kept)


def agreement_of(score: Tensor, loss: Tensor, kept: int) -> Agreement:
    """Agreement of scores with losses, ``(pools, R)`` each."""
    pools = len(score)
    hit = (score.argmax(dim=1) == loss.argmax(dim=1)).double()
    ours, best = (torch.zeros_like(x).scatter(1, x.topk(kept, dim=1).indices, 1.0) for x in (score, loss))
    overlap = (ours * best).sum(dim=1) / kept

    def error(x: Tensor) -> float:
        # A share of 0 or 1 has no spread; what it may still hide is of the order of one pool.
        return max(x.std(correction=0).item() / math.sqrt(pools), 1 / pools)

    return Agreement(hit.mean().item(), error(hit), overlap.mean().item(), error(overlap))

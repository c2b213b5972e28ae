"""Fidelity: how well a score ranks like the exact loss, and what greedy selection on it gains."""

import torch
from torch import Tensor

from earlysift import selectors


def fidelity(scores: Tensor, exact: Tensor, kept: int) -> dict[str, float]:
    """How well scores rank like exact losses, and what greedy selection on them gains.

    Args:
        scores: ``(R,)``.
        exact: Exact losses of the same candidates, ``(R,)``.
        kept: Number that would be kept, b.

    Returns:
        ``rank_correlation`` (Spearman, over candidates finite in both), ``overlap`` of the two kept sets (share of
        b), and ``gain`` (rho: mean exact loss of the kept over that of the pool).

    Example:
        >>> import torch
        >>> fidelity(torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([1.0, 2.0, 3.0, 6.0]), 2)
        {'rank_correlation': 1.0, 'overlap': 1.0, 'gain': 1.5}
    """
    finite = torch.isfinite(scores) & torch.isfinite(exact)
    scores, exact = scores[finite], exact[finite]
    kept = min(kept, len(scores))
    if kept == 0:
        return {}
    chosen = selectors.greedy(scores, kept).indices
    best = selectors.greedy(exact, kept).indices
    return {
        "rank_correlation": rank_correlation(scores, exact),
        "overlap": torch.isin(chosen, best).double().mean().item(),
        "gain": gain(exact, chosen),
    }


def rank_correlation(scores: Tensor, exact: Tensor) -> float:
    """Spearman's, of finite scores and losses, ``(R,)`` each; 0 where either are all alike."""
    return _pearson(_ranks(scores), _ranks(exact))


def gain(exact: Tensor, chosen: Tensor) -> float:
    """rho: mean exact loss of the chosen over that of all, of finite losses ``(R,)``."""
    return (exact[chosen].double().mean() / exact.double().mean()).item()


def _ranks(values: Tensor) -> Tensor:
    # Ties share the mean of their ranks.
    _, inverse, counts = torch.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum(0)
    ranks: Tensor = (2 * last - counts - 1).double() / 2
    return ranks[inverse]


def _pearson(x: Tensor, y: Tensor) -> float:
    x, y = x - x.mean(), y - y.mean()
    norm = (x.square().sum() * y.square().sum()).sqrt()
    return (x @ y / norm).clamp(-1, 1).item() if norm > 0 else 0.0

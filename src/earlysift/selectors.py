"""Scores to selection: which b of the R candidates are trained on, and with what weights.

A selector is any callable ``(scores (R,), kept, generator) -> Selection``; a lambda is a full citizen. All selectors
here keep exactly ``kept`` candidates, so shapes stay static and every rank of a distributed run keeps the same number.

The order of candidates, wherever one is needed: finite scores, largest first; then unlabelled samples (``-inf``,
harmless); then non-finite scores (``nan``, ``+inf``). Ties keep the order of the pool.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Generator, Tensor


class Selection(NamedTuple):
    """The kept candidates: ``indices`` int64 ``(b,)`` in rising order, and their ``weights`` float32 ``(b,)``."""

    indices: Tensor
    weights: Tensor


UNIFORM_SHARE = 0.2  # of the unbiased rule's probabilities: no weight exceeds five

Selector = Callable[[Tensor, int, Generator], Selection]


def greedy(scores: Tensor, kept: int, generator: Generator | None = None) -> Selection:  # noqa: ARG001
    """Keep the candidates with the largest scores (greedy SGD; weights 1).

    Args:
        scores: One number per candidate, ``(R,)``.
        kept: Number of candidates to keep, b.
        generator: Not drawn from; all selectors are called alike.

    Returns:
        The selection; indices rise, so that keeping everything is the identity.

    Example:
        >>> import torch
        >>> greedy(torch.tensor([1.0, float("nan"), 3.0, 2.0]), 2).indices
        tensor([2, 3])

    Reference:
        Das et al., SIFT, ICML 2024, arXiv 2402.07052 (GSGD); the pool-of-R, keep-b form is DESIGN's.
    """
    _check(scores, kept)
    return _unweighted(ranking(scores)[:kept])


def proportional(scores: Tensor, kept: int, generator: Generator, *, uniform_share: float = UNIFORM_SHARE) -> Selection:
    r"""Draw candidates in proportion to their scores, with weights that keep the mean unbiased.

    ``p_i = (1 - u) s_i / sum(s) + u / R``, inclusion probability ``pi_i = min(1, b p_i)`` (the excess of capped
    candidates is shared out again), ``weight_i = b / (R pi_i)``, which is ``1 / (R p_i)`` where nothing is capped. Then
    ``E[(1/b) sum of weight_i x_i] = mean of x`` over the R candidates with a finite score. Systematic sampling over a
    random order draws exactly b distinct candidates.

    Args:
        scores: Non-negative, ``(R,)``. Unlabelled and non-finite ones are drawn only if too few others exist.
        kept: Number of candidates to keep, b.
        generator: The only source of randomness.
        uniform_share: u in (0, 1]; no weight exceeds 1 / u.

    Returns:
        The selection with its weights.

    Raises:
        ValueError: If a finite score is negative or ``uniform_share`` is outside (0, 1].

    Example:
        >>> import torch
        >>> s = proportional(torch.tensor([1.0, 1.0, 1.0, 1.0]), 2, torch.Generator().manual_seed(0))
        >>> s.weights
        tensor([1., 1.])

    Reference:
        Katharopoulos and Fleuret, 2018, arXiv 1803.00942 (weights); T7 in our notation.
        Madow, 1949 (systematic sampling).
    """
    _check(scores, kept)
    if not 0 < uniform_share <= 1:
        raise ValueError(f"uniform_share must be in (0, 1], got {uniform_share}. The usual value is 0.2.")
    usable = torch.isfinite(scores)
    if int(usable.sum()) <= kept:
        return greedy(scores, kept)
    usable_scores = scores[usable].double()
    if bool((usable_scores < 0).any()):
        raise ValueError(
            f"Proportional selection needs scores >= 0, got {float(usable_scores.min()):.4g}. "
            "Use the greedy selector, or shift the scores."
        )
    count = len(usable_scores)
    inclusion = inclusion_probabilities(usable_scores, kept, uniform_share)
    order = torch.randperm(count, generator=generator, device=generator.device).to(scores.device)
    start = torch.rand((), generator=generator, device=generator.device, dtype=torch.float64).to(scores.device)
    # Systematic sampling: points start, start + 1, ... on the line of cumulated probabilities each hit one candidate.
    line = inclusion[order].cumsum(0)
    points = torch.arange(kept, device=scores.device, dtype=torch.float64) + start
    hit = order[torch.searchsorted(line, points, right=True).clamp(max=count - 1)]
    indices, by_index = usable.nonzero().squeeze(1)[hit].sort()
    weights = (kept / (count * inclusion[hit])).float()
    return Selection(indices, weights[by_index])


def inclusion_probabilities(scores: Tensor, kept: int, uniform_share: float = UNIFORM_SHARE) -> Tensor:
    """Probability of each candidate to be drawn by `proportional`.

    Args:
        scores: Non-negative and finite, ``(R,)``.
        kept: b, at most R.
        uniform_share: u in (0, 1].

    Returns:
        float64 ``(R,)`` in (0, 1], sum b.

    Example:
        >>> import torch
        >>> inclusion_probabilities(torch.tensor([3.0, 1.0, 0.0]), 1, uniform_share=0.25)
        tensor([0.6458, 0.2708, 0.0833], dtype=torch.float64)
    """
    scores = scores.double()
    total = scores.sum()
    shares = scores / total if total > 0 else torch.full_like(scores, 1 / len(scores))
    shares = (1 - uniform_share) * shares + uniform_share / len(scores)
    # Cap at one and share the excess out among the rest until nothing exceeds one; ends because each round caps more.
    capped = torch.zeros_like(shares, dtype=torch.bool)
    while True:
        free = shares * ~capped
        inclusion = torch.where(capped, 1.0, free * (kept - capped.sum()) / free.sum())
        over = inclusion > 1
        if not bool(over.any()):
            return inclusion
        capped |= over


def percentile(scores: Tensor, kept: int, generator: Generator, *, beta: float = 1.0) -> Selection:
    r"""Draw candidates without replacement, with odds ``percentile(score) ** beta``; weights 1.

    Selective backprop draws each candidate by itself, with probability ``percentile ** beta`` among past losses, until
    a batch is full. Here the percentile is taken within the pool, and the Gumbel top-b trick keeps exactly b. That is
    milder: at keep 0.5 and beta 1 the highest eighth is kept with probability 0.77, by the paper's rule (the arm
    ``selective-backprop`` of ``earlysift compare``) with 0.94.

    Args:
        scores: ``(R,)``.
        kept: Number of candidates to keep, b.
        generator: The only source of randomness.
        beta: Selectivity; 0 is uniform.

    Returns:
        The selection.

    Example:
        >>> import torch
        >>> percentile(torch.arange(8.0), 4, torch.Generator().manual_seed(0), beta=50.0).indices
        tensor([4, 5, 6, 7])

    Reference:
        Jiang et al., Accelerating Deep Learning by Focusing on the Biggest Losers, 2019, arXiv 1910.00762.
    """
    _check(scores, kept)
    order = ranking(scores)
    ranks = torch.empty_like(order).scatter_(0, order, torch.arange(len(scores), device=scores.device).flip(0))
    log_odds = beta * torch.log((ranks + 1).double() / len(scores))
    uniform = torch.rand(len(scores), generator=generator, device=generator.device, dtype=torch.float64)
    gumbel = -torch.log(-torch.log(uniform.clamp(1e-300, 1 - 1e-16))).to(scores.device, non_blocking=True)
    keys = torch.where(torch.isfinite(scores), log_odds + gumbel, scores.double())
    return _unweighted(ranking(keys)[:kept])


UNWEIGHTED = (greedy, percentile)
"""Selectors whose weights are always 1."""


def drop_outliers(scores: Tensor, fraction: float, kept: int) -> Tensor:
    """Take the largest ``fraction`` of the finite scores out of candidacy: the outlier guard.

    Mislabelled and broken samples gather at the very top of the losses. They become ``-inf``; at least ``kept``
    candidates always stay.

    Args:
        scores: ``(R,)``.
        fraction: Share of the finite scores to drop, in [0, 1).
        kept: Number of candidates that must stay.

    Returns:
        Guarded scores, ``(R,)``.

    Example:
        >>> import torch
        >>> drop_outliers(torch.tensor([1.0, 9.0, 3.0, 2.0]), 0.25, 2)
        tensor([1., -inf, 3., 2.])
    """
    if fraction == 0:  # as is usual: nothing to rank, nothing to wait for
        return scores
    finite = int(torch.isfinite(scores).sum())
    dropped = max(0, min(int(fraction * finite), finite - kept))
    guarded = scores.clone() if scores.is_floating_point() else scores.double()
    guarded[ranking(scores)[:dropped]] = -torch.inf
    return guarded


def ranking(scores: Tensor) -> Tensor:
    """All candidates from first to last choice, int64 ``(R,)``: finite scores falling, unlabelled, non-finite.

    Example:
        >>> import torch
        >>> ranking(torch.tensor([float("inf"), -float("inf"), 1.0, 2.0, 1.0]))
        tensor([3, 2, 4, 1, 0])
    """
    keys = scores.double()  # room below every float32 for the two classes without a loss
    keys = torch.where(keys == -torch.inf, torch.finfo(torch.float64).min, keys)
    keys = torch.where(torch.isfinite(keys), keys, -torch.inf)
    return torch.sort(keys, descending=True, stable=True).indices


def require_selection(selection: Selection, kept: int, candidates: int, *, look: bool) -> None:
    """Refuse what a selector returned, if no batch can be taken by it.

    Args:
        selection: What it returned.
        kept: Number of candidates that it had to keep.
        candidates: R.
        look: Whether to look at indices and weights themselves, which waits for an accelerator.

    Raises:
        ValueError: If it is something else than a selection of that many candidates.
    """
    indices, weights = (getattr(selection, name, None) for name in ("indices", "weights"))
    if not (isinstance(indices, Tensor) and isinstance(weights, Tensor)):
        raise ValueError(
            f"Expected the selector to return Selection(indices, weights), two tensors, got {type(selection).__name__}."
        )
    if indices.shape != (kept,):
        raise ValueError(
            f"Expected the selector to keep {kept} candidates, got indices of shape {tuple(indices.shape)}. "
            "A fixed number keeps shapes static and ranks in step."
        )
    if indices.dtype not in (torch.int64, torch.int32) or not weights.is_floating_point() or weights.shape != (kept,):
        raise ValueError(
            f"Expected the selector to return whole numbers as indices and real ones as weights, ({kept},) each, got "
            f"{indices.dtype} and {weights.dtype} {tuple(weights.shape)}."
        )
    if look and bool(((indices < 0) | (indices >= candidates) | ~torch.isfinite(weights)).any()):
        raise ValueError(
            f"Expected the selector to return indices in 0..{candidates - 1} and finite weights, got "
            f"{indices.tolist()} and {weights.tolist()}."
        )


def uniform_subset(candidates: int, kept: int, generator: Generator) -> Selection:
    """Keep ``kept`` of ``candidates`` uniformly at random, weights 1: what a step without selection does.

    Example:
        >>> import torch
        >>> uniform_subset(4, 4, torch.Generator()).indices
        tensor([0, 1, 2, 3])
    """
    return _unweighted(torch.randperm(candidates, generator=generator, device=generator.device)[:kept])


def number_drawn(kept: int, share: float) -> int:
    """Candidates of a batch that `explored` draws: at least one where there is a share, and never the whole batch.

    Example:
        >>> number_drawn(32, 0.1), number_drawn(4, 0.1), number_drawn(1, 0.1), number_drawn(32, 0.0)
        (3, 1, 0, 0)
    """
    return min(max(1, round(share * kept)), kept - 1) if share > 0 else 0


def explored(chosen: Tensor, drawn: int, scores: Tensor, generator: Generator) -> tuple[Selection, Tensor]:
    """Add to the chosen candidates some that are drawn uniformly from all others.

    What is drawn keeps easy samples from being forgotten, and what it loses stands for what all others would:
    ``sum_i stands_for_i x_i / sum_i stands_for_i`` over the kept is an unbiased estimate of the mean of x over all
    candidates with a finite score, a free look at the whole pool.

    Args:
        chosen: Candidates that are kept, int64 ``(k,)``.
        drawn: Number of candidates to add.
        scores: ``(R,)``; unlabelled and non-finite ones are drawn only if too few others exist.
        generator: The only source of randomness.

    Returns:
        The selection of k + drawn candidates, weights 1; and for every candidate how many it stands for, ``(R,)``: 1 if
        it was chosen, the number of all others over the number drawn if it was drawn, 0 if it is not kept.

    Example:
        >>> import torch
        >>> generator = torch.Generator().manual_seed(0)
        >>> selection, stands_for = explored(torch.tensor([7, 8, 9]), 1, torch.arange(10.0), generator)
        >>> selection.indices[1:], stands_for.sum(), stands_for.max()
        (tensor([7, 8, 9]), tensor(10.), tensor(7.))

    Reference:
        The estimate: Horvitz and Thompson, 1952.
    """
    chosen = chosen.long()
    stands_for = torch.zeros(len(scores), device=scores.device).index_fill(0, chosen, 1.0)
    others = torch.isfinite(scores) & (stands_for == 0)
    keys = torch.rand(len(scores), generator=generator, device=generator.device).to(scores.device, non_blocking=True)
    worse = torch.where(scores == -torch.inf, -1.0, -2.0)  # unlabelled before non-finite; the chosen come last of all
    lucky = ranking(torch.where(others, keys, worse).index_fill(0, chosen, torch.nan))[:drawn]
    stands_for = stands_for.index_put((lucky,), (others.sum() / drawn).clamp(min=1.0))
    return _unweighted(torch.cat([chosen, lucky])), stands_for


def _unweighted(indices: Tensor) -> Selection:
    return Selection(indices.sort().values, torch.ones(len(indices), device=indices.device))


def _check(scores: Tensor, kept: int) -> None:
    if scores.ndim != 1 or not 1 <= kept <= len(scores):
        raise ValueError(
            f"Expected scores (R,) and 1 <= kept <= R, got scores of shape {tuple(scores.shape)} and kept = {kept}. "
            "Use a larger pool or a smaller keep."
        )

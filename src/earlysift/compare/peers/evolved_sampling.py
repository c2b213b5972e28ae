"""Evolved sampling: draws in proportion to losses that are smoothed over a sample's past."""

from __future__ import annotations

from typing import TYPE_CHECKING

from earlysift.compare.arm import Arm, Step
from earlysift.compare.sifted import EXACT

if TYPE_CHECKING:
    from torch import Tensor

    from earlysift.compare.bench import Bench

# Betas and annealing are the paper's as told by others; of the paper itself only the abstract was at hand.
_BETAS = (0.2, 0.9)
_ANNEALED = 0.05  # share of the budget, at its beginning and at its end, that trains uniformly
_SMALLEST_SHARE = 1e-3  # of uniform sampling, which the selector needs


def steps(bench: Bench) -> Step:
    """Steps on batches drawn from scored pools, but for a first and a last part of the budget."""
    import torch

    from earlysift import pools, scorers, selectors
    from earlysift.seeds import seeded

    size, samples = bench.settings.batch, len(bench.workload.samples)
    scores = torch.full((samples,), 1 / samples)
    start = max(_ANNEALED, bench.settings.select_after)

    def step(share: float) -> None:
        selecting = start <= share < 1 - _ANNEALED
        candidates = bench.settings.pool if selecting else size
        ids = bench.stream.ids(bench.position, candidates)
        batch = bench.read(candidates)
        if selecting:
            with bench.ledger.timed("score"):
                losses = scorers.exact_loss(bench.model, batch, chunk_rows=size).cpu()
                weights, scores[ids] = evolve(scores[ids], losses, *_BETAS)
                generator = seeded(bench.seed, "evolved", bench.position)
                drawn = selectors.proportional(weights, size, generator, uniform_share=_SMALLEST_SHARE)
                batch = pools.take(batch, drawn.indices)
        with bench.ledger.timed("train"):
            bench.update(bench.loss(batch))
        bench.ledger.note(candidates=candidates, scored=candidates * selecting, trained=size)

    return step


def evolve(scores: Tensor, losses: Tensor, beta1: float, beta2: float) -> tuple[Tensor, Tensor]:
    r"""Weights to draw candidates by, and their new scores.

    ``w(t) = beta1 s(t - 1) + (1 - beta1) l(t)`` and ``s(t) = beta2 s(t - 1) + (1 - beta2) l(t)``. With ``beta1`` below
    ``beta2`` a weight is the smoothed loss plus a share of the loss's recent rise.

    Args:
        scores: s(t - 1) of the candidates, ``(R,)``.
        losses: l(t) of the candidates, ``(R,)``.
        beta1: Weight of the past in what is drawn by, in [0, 1]; 0 draws by the loss.
        beta2: Weight of the past in the score, in [0, 1].

    Returns:
        The weights, ``(R,)``, and the scores s(t), ``(R,)``.

    Example:
        >>> import torch
        >>> evolve(torch.tensor([1.0, 1.0]), torch.tensor([1.0, 3.0]), 0.5, 0.75)
        (tensor([1., 2.]), tensor([1.0000, 1.5000]))
    """
    return beta1 * scores + (1 - beta1) * losses, beta2 * scores + (1 - beta2) * losses


ARM = Arm(
    "evolved sampling",
    "draws from a pool, without replacement, in proportion to exact losses smoothed over the sample's past (beta 0.2 "
    "and 0.9), without weights; the first and the last 5 % of the budget (the paper counts epochs) train uniformly and "
    "leave the past as it is. Pruning of the data set is left out",
    steps,
    source="Cheng et al., 2025, arXiv 2509.23461",
    scoring=EXACT,
)

"""InfoBatch: every epoch skips some samples that were easy when last seen, and reweights the others like them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from earlysift.compare.arm import Arm, Step

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from earlysift.compare.bench import Bench

_RATIO = 0.5  # of the easy samples is skipped
_FULL_FROM = 0.875  # share of the budget from which nothing is skipped


def steps(bench: Bench) -> Step:
    """Steps on batches of those samples that the epoch does not skip."""
    import torch

    from earlysift.compare.predictions import mean_losses, sample_losses, weighted_loss
    from earlysift.seeds import seeded

    size, stream = bench.settings.batch, bench.stream
    last_losses = torch.full((len(bench.workload.samples),), torch.nan)
    kept, weights = prune(last_losses, 0.0, seeded(bench.seed, "infobatch"))

    def step(share: float) -> None:
        nonlocal kept, weights
        positions = torch.empty(0, dtype=torch.int64)
        while len(positions) < size:
            epoch, within = divmod(bench.position, stream.epoch)
            if share >= _FULL_FROM:
                kept, weights = torch.ones_like(kept), torch.ones_like(weights)
            elif within == 0:
                kept, weights = prune(last_losses, _RATIO, seeded(bench.seed, "infobatch", epoch))
            count = min(size - len(positions), stream.epoch - within)
            shown = kept[stream.ids(bench.position, count)].nonzero().squeeze(1)
            positions = torch.cat([positions, bench.position + shown])
            bench.position += count
        ids = torch.cat([stream.ids(position, 1) for position in positions.tolist()])
        batch = bench.take(positions)
        with bench.ledger.timed("train"):
            predicted = bench.predict(batch)
            sums = sample_losses(predicted)
            bench.update(weighted_loss(sums, predicted.counts, weights[ids].to(bench.device)))
        last_losses[ids] = mean_losses(sums, predicted.counts).cpu()
        bench.ledger.note(candidates=size, trained=size)

    return step


def prune(last_losses: Tensor, ratio: float, generator: Generator) -> tuple[Tensor, Tensor]:
    """Which samples an epoch shows, and the weights of their gradients.

    A sample whose last loss was below the mean is left out with probability ``ratio``; if it stays its gradient is
    scaled by ``1 / (1 - ratio)``. Then the expected gradient is that of the whole epoch.

    Args:
        last_losses: Loss of every sample when it was last trained on, ``(N,)``; nan if it never was (then it stays).
        ratio: r, in [0, 1).
        generator: The only source of randomness.

    Returns:
        ``kept``, bool ``(N,)``, and ``weights``, ``(N,)``.

    Example:
        >>> import torch
        >>> prune(torch.tensor([1.0, 9.0, torch.nan]), 0.0, torch.Generator())
        (tensor([True, True, True]), tensor([1., 1., 1.]))
    """
    import torch

    below = last_losses < last_losses.nanmean()
    kept = ~below | (torch.rand(len(last_losses), generator=generator) >= ratio)
    return kept, torch.where(below, 1 / (1 - ratio), 1.0)


ARM = Arm(
    "InfoBatch",
    "skips half of the samples whose last loss was below the mean, anew every epoch, and doubles the gradients of "
    "the other half; the last 12.5 % of training skips nothing. Needs several epochs",
    steps,
    source="Qin et al., 2024, arXiv 2303.04947",
    idle="the first epoch, which skips nothing, did not end",
)

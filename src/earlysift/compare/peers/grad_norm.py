"""Importance sampling by a bound on the gradient norm, while it reduces the variance of the gradient enough."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from earlysift.compare.arm import Arm, Operation, Step

if TYPE_CHECKING:
    from torch import Generator, Tensor, nn

    from earlysift.compare.bench import Bench
    from earlysift.families import Family
    from earlysift.pretrain.stream import Rows
    from earlysift.scorers import Predictions

_POOL_BATCHES = 3  # in a pool
_SMOOTHING = 0.9  # weight of the past in tau
_SMALLEST_SHARE = 1e-3  # of uniform sampling, which keeps the weights of importance sampling finite


def steps(bench: Bench, *, threshold: float = 1.5) -> Step:
    """Steps on batches drawn from scored pools while the variance reduction is large, on plain batches otherwise.

    Args:
        bench: What to train.
        threshold: The smoothed variance reduction tau above which pools are scored.
    """
    from earlysift.compare.predictions import sample_losses, weighted_loss
    from earlysift.seeds import seeded

    size = bench.settings.batch
    tau, count = 0.0, 0

    def step(_share: float) -> None:
        nonlocal tau, count
        if tau > threshold:
            pool = bench.read(_POOL_BATCHES * size)
            with bench.ledger.timed("score"):
                batch, weights, norms = draw(bench, pool, seeded(bench.seed, "importance", count))
            with bench.ledger.timed("train"):
                bench.update(bench.loss(batch, weights))
            bench.ledger.note(candidates=len(norms), scored=len(norms))
        else:
            batch = bench.read(size)
            with bench.ledger.timed("train"):
                predicted = bench.predict(batch)
                sums = sample_losses(predicted)
                bench.update(weighted_loss(sums, predicted.counts, sums.new_ones(len(sums))))
            norms = gradient_norms(predicted)
            bench.ledger.note(candidates=size)
        tau = _SMOOTHING * tau + (1 - _SMOOTHING) * variance_reduction(norms)
        count += 1
        bench.ledger.note(trained=size, tau=tau)

    return step


def draw(bench: Bench, pool: Rows, generator: Generator) -> tuple[Rows, Tensor, Tensor]:
    """Draw a batch from a pool in proportion to gradient norms; returns it with its weights and all norms."""
    from earlysift import pools, selectors

    size = bench.settings.batch
    norms = gradient_norm_scores(bench.model, pool, chunk_rows=size)
    selection = selectors.proportional(norms, size, generator, uniform_share=_SMALLEST_SHARE)
    return pools.take(pool, selection.indices), selection.weights, norms


def gradient_norms(predicted: Predictions) -> Tensor:
    r"""Norm of the gradient of every sample's loss with respect to its logits: ``(R,)``.

    ``norm_i^2 = sum over predictions of ||softmax(z) - onehot(y)||^2``. Up to a factor that all samples share this
    bounds the norm of the gradient with respect to the weights.

    Example:
        >>> import torch
        >>> from earlysift.scorers import Predictions
        >>> gradient_norms(Predictions(torch.zeros(2, 2), torch.tensor([0, 1]), torch.tensor([1, 1])))
        tensor([0.7071, 0.7071])
    """
    from earlysift.compare.predictions import per_sample

    probabilities = predicted.logits.detach().softmax(dim=-1)
    of_target = probabilities.gather(1, predicted.targets.unsqueeze(1)).squeeze(1)
    squares = probabilities.square().sum(dim=1) - 2 * of_target + 1
    return per_sample(squares.clamp(min=0), predicted.counts).sqrt()


def gradient_norm_scores(
    model: nn.Module, pool: Any, *, family: Family | None = None, chunk_rows: int | None = None
) -> Tensor:
    """`gradient_norms` as a score of every candidate of a pool, ``(R,)``, at full forward cost.

    Args:
        model: The model; left as it was.
        pool: Pool of R candidates with labels.
        family: A row for a model that `earlysift.families.FAMILIES` does not know.
        chunk_rows: Candidates that run at once; None runs the whole pool.
    """
    import torch

    from earlysift import passes, pools, scorers
    from earlysift.anatomy import find_anatomy

    size = pools.pool_size(pool)
    rows = chunk_rows or size
    precision = scorers.precision(find_anatomy(model, family), scorers.AUTO_DTYPE)  # as all other scores
    with torch.no_grad(), passes.scoring_mode(model), precision:
        parts = [pools.take(pool, slice(start, start + rows)) for start in range(0, size, rows)]
        return torch.cat([gradient_norms(scorers.predictions(model, part, family=family)) for part in parts])


def variance_reduction(norms: Tensor) -> float:
    r"""How much larger a uniform batch would have to be for the same variance of the gradient: tau, at least 1.

    ``1 / tau^2 = 1 - ||g - u||^2 / ||g||^2 = 1 / (R ||g||^2)`` with g the norms divided by their sum, u = 1 / R.

    Example:
        >>> import torch
        >>> variance_reduction(torch.tensor([1.0, 1.0, 1.0])), variance_reduction(torch.tensor([0.0, 0.0, 0.0, 1.0]))
        (1.0, 2.0)
    """
    shares = norms.double() / norms.double().sum().clamp(min=1e-300)
    return max(1.0, (len(norms) * shares.square().sum()).sqrt().item())


def _drawing(bench: Bench) -> Callable[[], object]:
    from earlysift.seeds import seeded

    pool = bench.read(bench.settings.pool)
    return lambda: draw(bench, pool, seeded(0))


ARM = Arm(
    "gradient norm",
    "draws from a pool of 3 b in proportion to a bound on the gradient norm, with unbiased weights, without "
    "replacement, while the variance reduction tau exceeds 1.5 (smoothed by 0.9); measuring tau on uniform batches "
    "meanwhile is not charged",
    steps,
    source="Katharopoulos and Fleuret, 2018, arXiv 1803.00942",
    scoring=Operation("grad_norm", "score", _drawing),
    idle="the variance reduction never exceeded 1.5",
)

"""What peers of SIFT need beyond it, each piece from its paper, as small pure functions.

Letters in shapes: R samples, n labelled predictions of all samples together (positions of a token task, samples of a
classification), V classes.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from earlysift import exits, pools, scorers
from earlysift.exits import Family
from earlysift.scorers import Predictions, predictions


def per_sample(values: Tensor, counts: Tensor) -> Tensor:
    """Sum the numbers ``(n,)`` of every sample: ``(R,)``.

    Example:
        >>> per_sample(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([1, 0, 2]))
        tensor([1., 0., 6.])
    """
    # Neighbours are summed in their order; a scatter with atomic adds would depend on the order of threads on a GPU.
    return torch.segment_reduce(values, "sum", lengths=counts)


def sample_losses(predicted: Predictions) -> Tensor:
    """Cross entropy of every sample, summed over its predictions: ``(R,)``."""
    return per_sample(F.cross_entropy(predicted.logits, predicted.targets, reduction="none"), predicted.counts)


def weighted_loss(sums: Tensor, counts: Tensor, weights: Tensor) -> Tensor:
    """``sum of weight_i * loss_i / number of predictions``, a scalar: `earlysift.scorers.training_loss` with weights.

    Args:
        sums: Losses summed over each sample's predictions, ``(R,)``.
        counts: Predictions of each sample, ``(R,)``.
        weights: ``(R,)``.
    """
    return (sums * weights).sum() / counts.sum().clamp(min=1)


def visible_labels(model: nn.Module, pool: Any) -> Tensor:
    """How many labelled positions of a candidate still show their own token: a score that needs no model, ``(R,)``.

    BERT leaves a tenth of the chosen tokens in place. They are predicted by copying, which is learnt first and counts
    in the accuracy, so a score that happens to prefer them looks better than it is. This one prefers nothing else.

    Example:
        >>> labels = torch.tensor([[-100, 8, 9], [7, 8, -100]])
        >>> pool = {"input_ids": torch.tensor([[7, 4, 9], [7, 8, 9]]), "labels": labels}
        >>> visible_labels(nn.Identity(), pool)
        tensor([1., 2.])
    """
    inputs, labels = pools.inputs_and_labels(pool)
    visible: Tensor = inputs["input_ids"] == labels
    return visible.sum(dim=1).float()


def accuracy(predicted: Predictions) -> float:
    """Share of the predictions that are right."""
    return (predicted.logits.argmax(dim=-1) == predicted.targets).double().mean().item()


def gradient_norms(predicted: Predictions) -> Tensor:
    r"""Norm of the gradient of every sample's loss with respect to its logits: ``(R,)``.

    ``norm_i^2 = sum over predictions of ||softmax(z) - onehot(y)||^2``. Up to a factor that all samples share this
    bounds the norm of the gradient with respect to the weights.

    Example:
        >>> uncertain = Predictions(torch.zeros(2, 2), torch.tensor([0, 1]), torch.tensor([1, 1]))
        >>> gradient_norms(uncertain)
        tensor([0.7071, 0.7071])

    Reference:
        Katharopoulos and Fleuret, 2018, arXiv 1803.00942.
    """
    with torch.no_grad():
        probabilities = F.softmax(predicted.logits, dim=-1)
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
        family: A row for a model that `earlysift.exits.FAMILIES` does not know.
        chunk_rows: Candidates that run at once; None runs the whole pool.
    """
    size = pools.pool_size(pool)
    rows = chunk_rows or size
    precision = scorers.precision(exits.find_anatomy(model, family), scorers.AUTO_DTYPE)  # as all other scores
    with torch.no_grad(), exits.scoring_mode(model), precision:
        parts = [pools.take(pool, slice(start, start + rows)) for start in range(0, size, rows)]
        return torch.cat([gradient_norms(predictions(model, part, family=family)) for part in parts])


def variance_reduction(norms: Tensor) -> float:
    r"""How much larger a uniform batch would have to be for the same variance of the gradient: tau, at least 1.

    ``1 / tau^2 = 1 - ||g - u||^2 / ||g||^2 = 1 / (R ||g||^2)`` with g the norms divided by their sum, u = 1 / R.

    Example:
        >>> variance_reduction(torch.tensor([1.0, 1.0, 1.0])), variance_reduction(torch.tensor([0.0, 0.0, 0.0, 1.0]))
        (1.0, 2.0)

    Reference:
        Katharopoulos and Fleuret, 2018, arXiv 1803.00942.
    """
    shares = norms.double() / norms.double().sum().clamp(min=1e-300)
    return max(1.0, (len(norms) * shares.square().sum()).sqrt().item())


def top_loss(sums: Tensor, counts: Tensor, q: int) -> Tensor:
    """Mean loss over the predictions of the q samples with the largest mean loss, a scalar: ordered SGD.

    Args:
        sums: Losses summed over each sample's predictions, ``(R,)``.
        counts: Predictions of each sample, ``(R,)``.
        q: Samples that count; R gives the ordinary loss.

    Example:
        >>> top_loss(torch.tensor([1.0, 5.0, 3.0]), torch.tensor([1, 1, 1]), 2)
        tensor(4.)

    Reference:
        Kawaguchi and Lu, 2020, arXiv 1907.04371.
    """
    chosen = (sums.detach() / counts.clamp(min=1)).topk(q).indices
    return weighted_loss(sums[chosen], counts[chosen], torch.ones_like(sums[chosen]))


ORDERED_SGD_STAGES = ((0.995, 16), (0.95, 8), (0.9, 4), (0.8, 2))


def ordered_sgd_q(batch: int, training_accuracy: float) -> int:
    """How many of the batch's losses ordered SGD averages: all, a half from 80 % training accuracy on, and so on.

    Example:
        >>> [ordered_sgd_q(64, accuracy) for accuracy in (0.5, 0.8, 0.92, 0.95, 1.0)]
        [64, 32, 16, 8, 4]

    Reference:
        Kawaguchi and Lu, 2020, arXiv 1907.04371.
    """
    divisor = next((divisor for bound, divisor in ORDERED_SGD_STAGES if training_accuracy >= bound), 1)
    return max(1, batch // divisor)


SELECTIVE_BACKPROP_HISTORY = 1024  # losses, as in the authors' code


def selection_probabilities(losses: Tensor, past: Tensor, beta: float) -> Tensor:
    r"""Probability of every candidate to be trained on, ``(R,)``: selective backprop.

    ``P_i = CDF(loss_i) ** beta``, with the CDF of the last losses that were seen: the share of them that is not above.

    Args:
        losses: Of the candidates, ``(R,)``; nan counts as the largest.
        past: The last losses, theirs included, ``(H,)``.
        beta: Selectivity; 0 keeps all, 1 half on average.

    Example:
        >>> selection_probabilities(torch.tensor([1.0, 4.0]), torch.tensor([4.0, 1.0, 2.0, 3.0]), 1.0)
        tensor([0.2500, 1.0000])

    Reference:
        Jiang et al., 2019, arXiv 1910.00762.
    """
    known, asked = (values.nan_to_num(nan=torch.inf, posinf=torch.inf) for values in (past, losses))
    return (torch.searchsorted(known.sort().values, asked, right=True) / len(known)) ** beta


def prune(last_losses: Tensor, ratio: float, generator: Generator) -> tuple[Tensor, Tensor]:
    """Which samples an epoch shows, and the weights of their gradients: InfoBatch.

    A sample whose last loss was below the mean is left out with probability ``ratio``; if it stays its gradient is
    scaled by ``1 / (1 - ratio)``. Then the expected gradient is that of the whole epoch.

    Args:
        last_losses: Loss of every sample when it was last trained on, ``(N,)``; nan if it never was (then it stays).
        ratio: r, in [0, 1).
        generator: The only source of randomness.

    Returns:
        ``kept``, bool ``(N,)``, and ``weights``, ``(N,)``.

    Example:
        >>> prune(torch.tensor([1.0, 9.0, torch.nan]), 0.0, Generator())
        (tensor([True, True, True]), tensor([1., 1., 1.]))

    Reference:
        Qin et al., InfoBatch, 2024, arXiv 2303.04947.
    """
    below = last_losses < last_losses.nanmean()
    kept = ~below | (torch.rand(len(last_losses), generator=generator) >= ratio)
    return kept, torch.where(below, 1 / (1 - ratio), 1.0)

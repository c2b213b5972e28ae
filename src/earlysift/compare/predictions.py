"""Losses of single samples from the predictions of a batch, for arms that need more than the mean.

Letters in shapes: R samples, n labelled predictions of all samples together (positions of a token task, samples of a
classification).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from earlysift.scorers import Predictions


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


def mean_losses(sums: Tensor, counts: Tensor) -> Tensor:
    """Mean loss of every sample, ``(R,)``, detached; 0 for samples without predictions."""
    return sums.detach() / counts.clamp(min=1)


def accuracy(predicted: Predictions) -> float:
    """Share of the predictions that are right."""
    return (predicted.logits.argmax(dim=-1) == predicted.targets).double().mean().item()

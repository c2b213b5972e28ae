"""Ordered SGD: trains on the largest losses of the batch itself."""

from __future__ import annotations

from collections import deque
from statistics import fmean
from typing import TYPE_CHECKING

from earlysift.compare.arm import Arm, Step

if TYPE_CHECKING:
    from torch import Tensor

    from earlysift.compare.bench import Bench

_STAGES = ((0.995, 16), (0.95, 8), (0.9, 4), (0.8, 2))  # training accuracy from which q is the batch over this
_ACCURACY_BATCHES = 100  # training accuracy is the mean over so many batches


def steps(bench: Bench) -> Step:
    """Steps on the q largest losses of a batch; q falls as training accuracy rises."""
    from earlysift.compare.predictions import accuracy, sample_losses

    size = bench.settings.batch
    accuracies: deque[float] = deque(maxlen=_ACCURACY_BATCHES)
    best = 0.0

    def step(_share: float) -> None:
        nonlocal best
        batch = bench.read(size)
        q = ordered_sgd_q(size, best)
        with bench.ledger.timed("train"):
            predicted = bench.predict(batch)
            bench.update(top_loss(sample_losses(predicted), predicted.counts, q))
        accuracies.append(accuracy(predicted))
        if len(accuracies) == _ACCURACY_BATCHES:
            best = max(best, fmean(accuracies))
        bench.ledger.note(candidates=size, trained=q)

    return step


def ordered_sgd_q(batch: int, training_accuracy: float) -> int:
    """How many of the batch's losses are averaged: all, a half from 80 % training accuracy on, and so on.

    Example:
        >>> [ordered_sgd_q(64, accuracy) for accuracy in (0.5, 0.8, 0.92, 0.95, 1.0)]
        [64, 32, 16, 8, 4]
    """
    divisor = next((divisor for bound, divisor in _STAGES if training_accuracy >= bound), 1)
    return max(1, batch // divisor)


def top_loss(sums: Tensor, counts: Tensor, q: int) -> Tensor:
    """Mean loss over the predictions of the q samples with the largest mean loss, a scalar.

    Args:
        sums: Losses summed over each sample's predictions, ``(R,)``.
        counts: Predictions of each sample, ``(R,)``.
        q: Samples that count; R gives the ordinary loss.

    Example:
        >>> import torch
        >>> top_loss(torch.tensor([1.0, 5.0, 3.0]), torch.tensor([1, 1, 1]), 2)
        tensor(4.)
    """
    from earlysift.compare.predictions import mean_losses, weighted_loss

    chosen = mean_losses(sums, counts).topk(q).indices
    return weighted_loss(sums[chosen], counts[chosen], sums.new_ones(q))


ARM = Arm(
    "ordered SGD",
    "averages the q largest losses of the batch itself; q halves when training accuracy (mean of the last 100 "
    "batches) first reaches 80, 90, 95 and 99.5 %",
    steps,
    source="Kawaguchi and Lu, 2020, arXiv 1907.04371",
    idle="training accuracy never reached 80 %",
)

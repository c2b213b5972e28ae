"""Predictive batch scheduling: keeps the candidates whose loss a linear model of token statistics predicts largest."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from earlysift.compare.arm import Arm, Operation, Step

if TYPE_CHECKING:
    from torch import Tensor

    from earlysift.compare.bench import Bench
    from earlysift.pretrain.stream import Rows

_RARE = 0.1  # share of the text that its rarest tokens make up
_MEMORY = 0.99  # weight of a batch's losses when the next batch comes, as losses fall while the model learns
_RIDGE = 1e-3


class Vocabulary(NamedTuple):
    """What the training part says about each of V tokens: log of its share of the text, and whether it is rare."""

    log_shares: Tensor
    rare: Tensor


class Moments(NamedTuple):
    """What least squares needs of all batches so far: ``X^T X``, ``(5, 5)``, and ``X^T y``, ``(5,)``."""

    gram: Tensor
    cross: Tensor


def steps(bench: Bench) -> Step:
    """Steps on the candidates with the largest predicted loss; the predictor learns from every batch."""
    from earlysift import pools
    from earlysift.compare.predictions import mean_losses, sample_losses, weighted_loss

    size, train = bench.settings.batch, bench.workload.samples.train
    vocabulary, moments = vocabulary_of(*tokens_of(train)), no_moments()

    def step(share: float) -> None:
        nonlocal moments
        selecting = share >= bench.settings.select_after
        candidates = bench.settings.pool if selecting else size
        ids = bench.stream.ids(bench.position, candidates)
        pool = bench.read(candidates)
        with bench.ledger.timed("score"):
            features = token_features(*tokens_of(train, ids), vocabulary)
            kept = select(features, moments, size)
            batch = pools.take(pool, kept)
        with bench.ledger.timed("train"):
            predicted = bench.predict(batch)
            sums = sample_losses(predicted)
            bench.update(weighted_loss(sums, predicted.counts, sums.new_ones(size)))
        with bench.ledger.timed("score"):
            moments = learn(moments, features[kept], mean_losses(sums, predicted.counts).cpu())
        bench.ledger.note(candidates=candidates, scored=candidates * selecting, trained=size)

    return step


def tokens_of(train: Rows, ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Tokens of samples before any is masked, int64 ``(R, L)``, and which are no padding, bool ``(R, L)``."""
    import torch

    rows = train if ids is None else {name: values[ids] for name, values in train.items()}
    tokens = rows["input_ids"].long()
    return tokens, rows["attention_mask"].bool() if "attention_mask" in rows else torch.ones_like(tokens).bool()


def vocabulary_of(tokens: Tensor, real: Tensor) -> Vocabulary:
    """Count the tokens of the training part.

    Rare are the least frequent tokens that make up a tenth of the text.

    Args:
        tokens: Of all samples, ``(N, L)``.
        real: Which are no padding, ``(N, L)``.

    Example:
        >>> import torch
        >>> text = torch.tensor([[0, 0, 0, 0, 0, 1, 1, 1, 1, 2]])
        >>> vocabulary_of(text, torch.ones_like(text).bool()).rare
        tensor([False, False,  True])
    """
    import torch

    counts = torch.bincount(tokens[real], minlength=int(tokens.max()) + 1).double()  # padding has a row, too
    order = counts.argsort(stable=True)
    rare = torch.empty(len(counts), dtype=torch.bool)
    rare[order] = counts[order].cumsum(0) <= _RARE * counts.sum()
    return Vocabulary((counts / counts.sum()).log(), rare)


def token_features(tokens: Tensor, real: Tensor, vocabulary: Vocabulary) -> Tensor:
    """One, and four numbers that say how hard the tokens of a sample may be: float64 ``(R, 5)``.

    They are the mean log frequency of its tokens, its length as a share of L, and the shares of its tokens that are
    distinct and rare.

    Args:
        tokens: ``(R, L)``.
        real: Which are no padding, ``(R, L)``.
        vocabulary: Of the training part that the samples are from.
    """
    import torch

    lengths = real.sum(dim=1).clamp(min=1)
    ordered = tokens.where(real, -1).sort(dim=1).values
    differs = ordered.diff(dim=1, prepend=torch.full_like(ordered[:, :1], -1)) != 0  # padding, -1, comes first
    columns = (
        torch.ones_like(lengths),
        vocabulary.log_shares[tokens].where(real, 0.0).sum(dim=1) / lengths,
        lengths / tokens.shape[1],
        differs.sum(dim=1) / lengths,
        (vocabulary.rare[tokens] & real).sum(dim=1) / lengths,
    )
    return torch.stack([column.double() for column in columns], dim=1)


def no_moments() -> Moments:
    """Moments before the first batch."""
    import torch

    return Moments(torch.zeros(5, 5, dtype=torch.float64), torch.zeros(5, dtype=torch.float64))


def learn(moments: Moments, features: Tensor, losses: Tensor) -> Moments:
    """Moments that take in a batch, and weigh all batches before it less.

    Args:
        moments: Of the batches before.
        features: Of the batch, float64 ``(b, 5)``.
        losses: Mean loss of each of its samples, ``(b,)``.
    """
    return Moments(
        _MEMORY * moments.gram + features.T @ features, _MEMORY * moments.cross + features.T @ losses.double()
    )


def predict(features: Tensor, moments: Moments) -> Tensor:
    """Predicted losses, float64 ``(R,)``, by ridge regression on the batches so far; zeros before the first."""
    import torch

    ridge = _RIDGE * torch.eye(5, dtype=torch.float64)  # where lengths are all equal, too, there is one solution
    coefficients: Tensor = torch.linalg.solve(moments.gram + ridge, moments.cross)
    return features @ coefficients


def select(features: Tensor, moments: Moments, size: int) -> Tensor:
    """Indices of the candidates with the largest predicted losses, ``(size,)``; before the first batch the first."""
    from earlysift import selectors

    return selectors.greedy(predict(features, moments), size).indices


def _scoring(bench: Bench) -> Callable[[], object]:
    """All that a step does beyond training: features of a pool, selecting, gathering, learning."""
    import torch

    from earlysift import pools

    settings, train = bench.settings, bench.workload.samples.train
    vocabulary = vocabulary_of(*tokens_of(train))
    ids = bench.stream.ids(bench.position, settings.pool)
    pool, losses = bench.read(settings.pool), torch.ones(settings.batch)

    def score() -> Moments:
        features = token_features(*tokens_of(train, ids), vocabulary)
        kept = select(features, no_moments(), settings.batch)
        pools.take(pool, kept)
        return learn(no_moments(), features[kept], losses)

    return score


ARM = Arm(
    "predictive batches",
    "keeps the candidates with the largest loss as predicted from four statistics of their tokens (mean log frequency, "
    "length, share of distinct and of rare ones) by ridge regression on the losses of the last hundred batches or so; "
    "the paper draws from classes of predicted loss, and fits by gradient steps. Counting the tokens "
    "is not charged, nor is fitting before selection begins",
    steps,
    source="Rasal, 2026, arXiv 2602.17066",
    scoring=Operation("predictive", "score", _scoring),
    tasks=("masked_lm", "causal_lm", "masked_characters", "classification"),
)

"""The order of candidates: an endless, seeded stream of samples, the same for every batch size."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Generator, Tensor

from earlysift.seeds import seeded

Rows = dict[str, Tensor]

UNIT = 16
"""Samples that are prepared together: a fixed number, so that masks do not depend on how many rows a step reads."""


@dataclass(frozen=True)
class Samples:
    """Samples of one kind, in two parts.

    Attributes:
        train: Stored rows of the training part: tensors ``(N, ...)`` by name.
        validation: Rows to evaluate, ``(M, ...)``, with fixed masks and with labels.
        prepare: From stored rows of the training part and a generator to a batch with labels.
    """

    train: Rows
    validation: Rows
    prepare: Callable[[Rows, Generator], Rows]

    def __len__(self) -> int:
        """N, the number of training samples."""
        return row_count(self.train)


def row_count(rows: Rows) -> int:
    """Number of rows: the common length of all tensors."""
    return len(next(iter(rows.values())))


def take(unit: Callable[[int], Rows], positions: Tensor) -> Rows:
    """Candidates by their numbers.

    Args:
        unit: From n to the ``UNIT`` candidates from number ``UNIT * n`` on; called with rising n.
        positions: The numbers, int64 ``(n,)``.

    Returns:
        A batch of n rows, in the order of the positions.

    Example:
        >>> take(lambda n: {"x": torch.arange(UNIT * n, UNIT * (n + 1))}, torch.tensor([40, 3]))
        {'x': tensor([40,  3])}
    """
    numbers, index = torch.unique(positions // UNIT, return_inverse=True)
    units = [unit(number) for number in numbers.tolist()]
    rows = index * UNIT + positions % UNIT
    return {name: torch.cat([rows_of_unit[name] for rows_of_unit in units])[rows] for name in units[0]}


class Stream:
    """Training samples in an order that depends on the seed alone, epoch after epoch.

    Candidate number n is the same sample with the same mask, whatever the batch size: arms with different pool sizes
    read the same data in the same order, and a resumed run needs only a position.

    Args:
        samples: The samples.
        seed: Seed of order and masks.
        subset: Share of the training part that an epoch uses; below 1 every epoch draws another subset.

    Raises:
        ValueError: If the share is not in (0, 1], or leaves no sample.

    Example:
        >>> samples = Samples({"x": torch.arange(5)}, {}, prepare=lambda rows, generator: rows)
        >>> Stream(samples, seed=0).read(0, 5)["x"].sort().values
        tensor([0, 1, 2, 3, 4])

    Reference:
        Random subsets: Okanovic et al., RS2, 2023, arXiv 2305.18424.
    """

    def __init__(self, samples: Samples, *, seed: int, subset: float = 1.0) -> None:
        self._samples = samples
        self._seed = seed
        self.epoch = round(subset * len(samples))
        """Candidates per epoch."""
        if not 0 < subset <= 1 or not self.epoch:
            raise ValueError(
                f"subset must be a share in (0, 1] that leaves at least one of {len(samples)} training samples, "
                f"got {subset}."
            )
        self._order = lru_cache(maxsize=2)(self._make_order)
        self._unit = lru_cache(maxsize=64)(self._make_unit)

    def read(self, start: int, count: int) -> Rows:
        """Candidates ``start`` to ``start + count - 1``: a batch of ``count`` rows."""
        return self.take(torch.arange(start, start + count))

    def take(self, positions: Tensor) -> Rows:
        """The candidates with these numbers, int64 ``(n,)``, in this order: a batch of n rows."""
        return take(self._unit, positions)

    def ids(self, start: int, count: int) -> Tensor:
        """Index of every candidate within the training part, int64 ``(count,)``."""
        return self.ids_of(torch.arange(start, start + count))

    def ids_of(self, positions: Tensor) -> Tensor:
        """The same for the candidates with these numbers, int64 ``(n,)``, in this order."""
        epochs, within = positions // self.epoch, positions % self.epoch
        ids = torch.empty_like(positions)
        for epoch in torch.unique(epochs).tolist():
            ids[epochs == epoch] = self._order(epoch)[within[epochs == epoch]]
        return ids

    def _make_order(self, epoch: int) -> Tensor:
        return torch.randperm(len(self._samples), generator=seeded(self._seed, "order", epoch))[: self.epoch]

    def _make_unit(self, number: int) -> Rows:
        ids = self.ids(number * UNIT, UNIT)
        rows = {name: values[ids] for name, values in self._samples.train.items()}
        return self._samples.prepare(rows, seeded(self._seed, "mask", number))

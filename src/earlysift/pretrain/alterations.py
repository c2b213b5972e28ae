"""Alterations of a data set, seeded: fewer training samples, repeated samples, flipped labels."""

import torch
from torch import Tensor

from earlysift.pretrain.stream import Rows, row_count
from earlysift.pretrain.workload_settings import WorkloadSettings
from earlysift.seeds import seeded

_REPEATED_SAMPLES = 64  # the samples that copies are made of


def alter(
    train: Rows, validation: Rows, settings: WorkloadSettings, *, classes: int, seed: int
) -> tuple[Rows, Rows, str]:
    """Alter both parts as the settings say; evaluation keeps the true labels.

    Args:
        train: Rows of the training part.
        validation: Rows of the validation part.
        settings: ``train_samples``, ``repeated`` and ``flipped`` are read; ``augmented`` only names the workload, as
            samples are augmented when they are read.
        classes: Number of classes, if labels are flipped.
        seed: Seed of which samples are used, copied and flipped.

    Returns:
        Both parts, and what to add to the name of the workload.
    """
    changes = ""
    if settings.train_samples is not None:
        train = _subset(train, settings.train_samples, seed)
    if settings.flipped:
        changes += f", {settings.flipped:.0%} of labels flipped"
    if settings.repeated:
        train, validation = _repeat(train, validation, settings.repeated, seed)
        changes += f", {settings.repeated:.0%} repeated"
    if settings.augmented:
        changes += ", augmented"
    if settings.flipped:
        train = {**train, "labels": _flip(train["labels"], settings.flipped, classes, seed)}
    return train, validation, changes


def _subset(rows: Rows, count: int, seed: int) -> Rows:
    """Random rows, at most all, in their old order."""
    order = torch.randperm(row_count(rows), generator=seeded(seed, "train samples"))
    chosen = order[:count].sort().values
    return {name: values[chosen] for name, values in rows.items()}


def _repeat(train: Rows, validation: Rows, share: float, seed: int) -> tuple[Rows, Rows]:
    """Put copies of a few training samples in random places of both parts."""
    common = torch.randperm(row_count(train), generator=seeded(seed, "repeated samples"))[:_REPEATED_SAMPLES]

    def with_copies(rows: Rows, part: str) -> Rows:
        generator = seeded(seed, "repeated", part)
        size = row_count(rows)
        replaced = torch.randperm(size, generator=generator)[: round(share * size)]
        copies = common[torch.randint(len(common), replaced.shape, generator=generator)]
        return {name: values.index_copy(0, replaced, train[name][copies]) for name, values in rows.items()}

    return with_copies(train, "train"), with_copies(validation, "validation")


def _flip(labels: Tensor, share: float, classes: int, seed: int) -> Tensor:
    """Replace a share of the labels by another class, every other one with the same odds."""
    generator = seeded(seed, "flipped")
    replaced = torch.randperm(len(labels), generator=generator)[: round(share * len(labels))]
    steps = torch.randint(1, classes, replaced.shape, generator=generator)
    return labels.index_copy(0, replaced, (labels[replaced] + steps) % classes)

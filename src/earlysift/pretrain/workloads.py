"""Workloads, ready to run: samples, models and the baseline to beat, from the settings that describe them."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Generator, Tensor, nn

from earlysift.losses import IGNORED_LABEL
from earlysift.pretrain import tasks
from earlysift.pretrain.alterations import alter
from earlysift.pretrain.stream import Rows, Samples, row_count
from earlysift.pretrain.workload_settings import WorkloadSettings
from earlysift.seeds import seeded

_OF_SOME_TASKS = (
    "data",
    "text_column",
    "label_column",
    "max_characters",
    "checkpoint",
    "flipped",
    "augmented",
    "architecture",
)


@dataclass(frozen=True)
class Workload:
    """Samples, the model to train on them, and what is known about both.

    Attributes:
        name: What reports call it.
        task: Name of the task.
        samples: Training and validation samples.
        make_model: From a seed to a model in training mode.
        baseline: ``accuracy`` and ``loss`` (nats) on the validation part of a model that ignores its input and
            predicts how often every token or class occurs in the training part.
        facts: Sizes and settings of the data, for the results file.
        tokenizer_json: The tokenizer, for `save_encoder`; empty for images.
    """

    name: str
    task: str
    samples: Samples
    make_model: Callable[[int], nn.Module]
    baseline: dict[str, float]
    facts: dict[str, Any]
    tokenizer_json: str = ""


def _as_stored(rows: Rows, _: Generator) -> Rows:
    return rows


def _labels(rows: Rows) -> Tensor:
    return rows["labels"]


@dataclass(frozen=True, kw_only=True)
class TaskData:
    """All samples of a task, and the model to train on them: what the file of a task returns.

    Attributes:
        name: Data and task, for reports.
        train: Rows of the training part: tensors ``(N, ...)`` by name.
        validation: Rows of the validation part, ``(M, ...)``.
        outputs: Number of tokens or classes to choose from.
        make_model: From a seed to a model in training mode.
        prepare: From stored rows and a generator to a batch with ``labels``. Without it stored rows are the batch.
        augment: What the setting ``augmented`` does to stored rows of the training part before ``prepare``, whenever
            they are read.
        targets: From stored rows to all tokens or classes that may be predicted there, int64 ``(n,)``. Without it the
            labels.
        facts: Sizes and settings of the data, for the results file.
        tokenizer_json: The tokenizer, where there is one.
    """

    name: str
    train: Rows
    validation: Rows
    outputs: int
    make_model: Callable[[int], nn.Module]
    facts: dict[str, Any]
    prepare: Callable[[Rows, Generator], Rows] = _as_stored
    augment: Callable[[Rows, Generator], Rows] = _as_stored
    targets: Callable[[Rows], Tensor] = _labels
    tokenizer_json: str = ""


def load_workload(settings: WorkloadSettings, *, seed_of_data: int = 0, **extras: Any) -> Workload:
    """Read the data of a task and make it ready to train on.

    Args:
        settings: The workload.
        seed_of_data: Seed of which samples are used, copied and flipped.
        extras: Further settings of the task by name, such as ``whole_word`` of masked_lm; None and False count as not
            given.

    Returns:
        The workload; the same arguments give the same one everywhere.

    Raises:
        ValueError: If settings do not fit the task, or the data cannot be used.
        FileNotFoundError: If a path leads nowhere.
        ImportError: If an optional package is missing.

    Example:
        >>> workload = load_workload(WorkloadSettings(task="image", layers=2, width=32, validation_samples=99))
        >>> {name: tuple(rows.shape) for name, rows in workload.samples.validation.items()}
        {'pixel_values': (99, 1, 8, 8), 'labels': (99,)}
    """
    task = importlib.import_module(f"{tasks.__name__}.{settings.task}")
    extras = {name: value for name, value in extras.items() if value}
    defaults = {field.name: field.default for field in fields(WorkloadSettings)}
    given = [name for name in _OF_SOME_TASKS if getattr(settings, name) != defaults[name]] + list(extras)
    refused = [name for name in given if name not in task.TAKES]
    if refused:
        raise ValueError(
            f"The task {settings.task} does not take {', '.join(refused)}; leave that out. Besides the settings of "
            f"every task it takes {', '.join(task.TAKES)}."
        )
    data: TaskData = task.read(settings, **extras)
    train, validation, changes = alter(
        data.train,
        _spread(data.validation, settings.validation_samples),
        settings,
        classes=data.outputs,
        seed=seed_of_data,
    )
    augment = data.augment if settings.augmented else _as_stored

    def prepare_to_train(rows: Rows, generator: Generator) -> Rows:
        return data.prepare(augment(rows, generator), generator)

    samples = Samples(train, data.prepare(validation, seeded("validation mask")), prepare_to_train)
    return Workload(
        name=data.name + changes,
        task=settings.task,
        samples=samples,
        make_model=data.make_model,
        baseline=_baseline(data.targets(train), samples.validation["labels"], data.outputs),
        facts={
            "train_samples": len(samples),
            "validation_samples": row_count(validation),
            **data.facts,
            "flipped": settings.flipped,
            "repeated": settings.repeated,
            "augmented": settings.augmented,
        },
        tokenizer_json=data.tokenizer_json,
    )


def _spread(rows: Rows, count: int) -> Rows:
    """Rows at even distances, at most all."""
    size = row_count(rows)
    chosen = torch.linspace(0, size - 1, min(count, size)).long()
    return {name: values[chosen] for name, values in rows.items()}


def _baseline(targets: Tensor, labels: Tensor, outputs: int) -> dict[str, float]:
    """Accuracy and loss of predicting every label by how often it occurs among the targets, plus one."""
    counts = torch.bincount(targets.long(), minlength=outputs).double() + 1
    probabilities = counts / counts.sum()
    labels = labels[labels != IGNORED_LABEL]
    return {
        "accuracy": (labels == probabilities.argmax()).double().mean().item(),
        "loss": -probabilities[labels].log().mean().item(),
    }

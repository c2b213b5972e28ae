"""Names of classes to class ids, of texts and images alike."""

from collections.abc import Sequence

import torch
from torch import Tensor


def class_ids(name: str, train: Sequence[str], validation: Sequence[str]) -> tuple[list[str], Tensor, Tensor]:
    """Number the classes of labelled data by the names that its training part has.

    Args:
        name: What errors call the data.
        train: The class of every training sample, by name.
        validation: The class of every held-out sample.

    Returns:
        The names in the order of their ids, numbers by size (2 before 10), and the ids of both parts, int64 ``(N,)``
        and ``(M,)``.

    Raises:
        ValueError: If training has fewer than two classes, or a held-out sample is of another one.

    Example:
        >>> class_ids("digits", ["10", "2", "10"], ["2"])
        (['2', '10'], tensor([1, 0, 1]), tensor([0]))
    """
    classes = sorted(set(train), key=lambda label: (len(label), label))
    unknown = sorted(set(validation) - set(classes))
    if len(classes) < 2:
        found = f"only {classes[0]!r}" if classes else "none"
        raise ValueError(
            f"{name}: expected samples of two classes or more in training, found {found}; add samples of another class."
        )
    if unknown:
        raise ValueError(
            f"{name}: the held-out part has classes that training does not have: {', '.join(unknown[:5])}; leave "
            "their samples out, or add some to training."
        )
    id_of = {label: number for number, label in enumerate(classes)}
    train_ids, validation_ids = (torch.tensor([id_of[label] for label in part]) for part in (train, validation))
    return classes, train_ids, validation_ids

"""Ids, groups and losses of single samples within a Trainer, which knows none of them."""

from collections.abc import Callable, Collection, Iterator, Mapping, MutableMapping
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from earlysift import checks, losses, passes, pools
from earlysift.anatomy import Anatomy
from earlysift.config import SiftConfig
from earlysift.datasets import WithIds, is_map_style
from earlysift.measures import LOSS
from earlysift.seeds import reseeded

NO_IDS = (
    "The samples have no ids under sample_id={key!r}, and those of a stream get none: they never return, so that "
    "remembering their losses is of no use. Use a map-style data set, or give the samples ids that return."
)
NO_GROUPS = (
    "The samples have no groups under group={key!r}. Give the data set a column of their numbers (0, 1, ...), or leave "
    "group out."
)
NO_LOSSES = (
    "The losses of single samples are remembered, and read off the logits that the model returns and the batch's "
    "labels. One of them is missing, or the loss is a CTC loss. Use a loop of your own, with Sifter.observe."
)
NO_DOCUMENTS = (
    "The losses of single samples are remembered or weighed, and cannot be read off batches that are one row of "
    "documents. Use padding_free=False, or a loop of your own with Sifter.loss."
)
NO_WEIGHTS = (
    "Weights of samples need the loss and the logits that the model returns, and a label for each of the logits: one "
    "of them is missing, or the task is CTC or question answering. Use select=greedy, or a loop of your own with "
    "Sifter.loss(batch, weights=...)."
)
_READ_TOKENS = 4096  # positions whose logits are copied at once


def columns(dataset: Any) -> Collection[str]:
    """The names of what its samples hold, as far as the data set tells them."""
    return getattr(dataset, "column_names", None) or ()


def numbered(dataset: Any, key: str) -> Any:
    """A data set whose samples have ids under a key: their own, or else their indices."""
    if not is_map_style(dataset) or len(dataset) == 0:
        return dataset
    names = columns(dataset)
    if not names:
        with reseeded("sample", device=torch.device("cpu")):  # samples may be drawn
            sample = dataset[0]
        names = sample if isinstance(sample, Mapping) else ()
    return dataset if key in names else WithIds(dataset, key)


def collated(collate: Callable[[Any], Any], problems: Mapping[str, str], samples: Any) -> Any:
    """A batch with the samples' ids and groups, which collators do not know.

    Args:
        collate: Makes a batch of the rest.
        problems: Keys of the numbers to keep, and what is wrong where samples have none: see `problems_of`.
        samples: The samples.

    Raises:
        ValueError: If samples have none.
    """
    if isinstance(samples, Mapping):  # the data set itself has collated them
        return collate(samples)
    for key, problem in problems.items():
        if not all(isinstance(sample, Mapping) and key in sample for sample in samples):
            raise ValueError(problem)
    batch = collate([{name: value for name, value in sample.items() if name not in problems} for sample in samples])
    for key in problems:
        batch[key] = numbers = [sample[key] for sample in samples]
        with suppress(TypeError, ValueError):  # the sifter refuses what are no numbers, as all wrong ids
            batch[key] = torch.as_tensor(numbers)
    return batch


def problems_of(config: SiftConfig) -> dict[str, str]:
    """The keys of the samples' ids and groups, as far as there are any, and what is wrong where samples have none."""
    messages = {config.group: NO_GROUPS, config.sample_id: NO_IDS}
    return {key: problem.format(key=key) for key, problem in messages.items() if key is not None}


def losses_of(outputs: Any, labels: Any, anatomy: Anatomy | None) -> Tensor:
    """The mean loss of every sample ``(b,)`` from the outputs of the forward pass that is trained on."""
    assert anatomy is not None
    with torch.no_grad():
        if _has_log_probs(outputs):  # 0 where there is no label
            counts = outputs["label_mask"].sum(dim=1)
            means = -outputs["log_probs"].float().sum(dim=1) / counts
            return torch.where(counts > 0, means, losses.UNLABELLED)
        named = outputs if isinstance(outputs, Mapping) and anatomy.task != "ctc" else {}
        has_logits = any(named.get(name) is not None for name in ("logits", "start_logits"))
        if not has_logits or not isinstance(labels, Tensor):
            raise ValueError(NO_LOSSES)
        score = partial(
            losses.sample_scores, LOSS, anatomy.task, head=nn.Identity(), problem=checks.problem_of(anatomy)
        )
        return torch.cat([score(*some) for some in _rows_at_once(passes.logits_of(outputs), labels, anatomy)])


def can_weigh(outputs: Any, labels: Any, anatomy: Anatomy) -> bool:
    """Whether `weigh` finds what it needs in what a model returned while it was trained.

    Question answering is left out: models average starts and ends apart.
    """
    if _has_log_probs(outputs):
        return True
    named = outputs if isinstance(outputs, MutableMapping) else {}
    loss, logits = named.get("loss"), named.get("logits")
    if anatomy.task in ("ctc", "question_answering") or loss is None:
        return False
    if not isinstance(logits, Tensor) or not isinstance(labels, Tensor):
        return False
    return not anatomy.by_token or bool(logits.shape[:2] == labels.shape)


def _has_log_probs(outputs: Any) -> bool:
    return isinstance(outputs, Mapping) and outputs.get("log_probs") is not None  # TRL's


def divides_by_items(model: nn.Module, inputs: Mapping[str, Any], anatomy: Anatomy) -> bool | None:
    """Whether a model divides the sum of its losses by ``num_items_in_batch``; None if these inputs cannot tell.

    Some take the argument, and divide by the number of labels of this batch all the same.
    """
    rows = checks.few_rows(anatomy, dict(inputs))
    device = next(model.parameters()).device
    with torch.no_grad(), passes.uncompiled(), passes.scoring_mode(model):
        few, many = (
            passes.named_output(passes.run(model, {**rows, "num_items_in_batch": items}), "loss")
            for items in torch.tensor([1e3, 1e6], device=device)
        )
    return bool(few > 2 * many) if bool(torch.isfinite(few)) and bool(few > 0) else None


def weigh(outputs: Any, labels: Any, anatomy: Anatomy, weights: Tensor, items: Tensor | float | None) -> Tensor:
    """Weigh the samples in the loss of a forward pass, in place.

    ``loss + sum_i (w_i - 1) l_i / items``, so that what a model adds to the losses of its predictions, as for its
    routers, stays as it is; with weights 1 nothing changes. TRL sums up log-probabilities, which are weighed instead.
    Losses are computed once more in the backward pass, which then holds no second copy of the logits.

    Args:
        outputs: What the model returned, with the loss that it is trained by.
        labels: Of the batch.
        anatomy: The model's.
        weights: Of the batch's samples, ``(b,)``.
        items: What the model divided its sum by; None is the number of labelled positions (of samples, in
            classification).

    Returns:
        The mean loss of every sample, ``(b,)``, detached; ``-inf`` for unlabelled ones.

    Raises:
        ValueError: If loss, logits or labels are missing.
    """
    if not can_weigh(outputs, labels, anatomy):
        raise ValueError(NO_WEIGHTS)
    if _has_log_probs(outputs):
        means = losses_of(outputs, labels, anatomy)
        outputs["log_probs"] = outputs["log_probs"] * weights[:, None]
        return means
    sum_up = partial(losses.sample_sums, anatomy.task, head=nn.Identity(), problem=checks.problem_of(anatomy))
    parts = [
        checkpoint(sum_up, some, of_some, use_reentrant=False, preserve_rng_state=False)
        for some, of_some in _rows_at_once(passes.logits_of(outputs), labels, anatomy)
    ]
    sums, counts = (torch.cat(each) for each in zip(*parts, strict=True))
    divisor = counts.sum().clamp(min=1) if items is None else items
    outputs["loss"] = outputs["loss"] + ((weights - 1) * sums).sum() / divisor
    return torch.where(counts > 0, sums / counts, losses.UNLABELLED).detach()


def _rows_at_once(logits: Tensor, labels: Tensor, anatomy: Anatomy) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits and labels, some rows at a time."""
    rows = max(1, _READ_TOKENS // pools.length(logits)) if anatomy.by_token else len(logits)
    return zip(torch.split(logits, rows), torch.split(labels, rows), strict=True)

"""Measures of samples: hidden states (or logits) and labels in, one float32 number per sample out.

Only labelled positions are ever put through the head, a chunk at a time, so that no (positions, vocabulary) matrix of a
pool exists. For masked language modelling this is the design, not an optimisation: a dense BERT head costs more than
three layers.

Letters in shapes: R samples in the pool, T positions, D width of the hidden states, V vocabulary, C classes, N labelled
positions of all samples together.

The place of samples that have no loss: a sample without any labelled position gets ``-inf`` (it ranks below every
finite score and is counted as unlabelled); a sample whose loss is not finite keeps its ``nan`` or ``inf`` (it ranks
below everything and is counted as non-finite). `earlysift.selectors` gives both their order.
"""

from collections.abc import Callable, Iterator
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from earlysift.measures import IGNORED_LABEL as IGNORED_LABEL
from earlysift.measures import LOSS, Measure
from earlysift.presets import BY_TOKEN, Task
from earlysift.presets import Problem as Problem

UNLABELLED = -torch.inf
_CHUNK_TOKENS, _CHUNK_TOKENS_ON_CPU = 4096, 1024
_SPREAD_OVER, _FAR_APART = 1 << 20, 648_055  # positions that a sample may have; the odd number next to 0.618 times that

Head = Callable[[Tensor], Tensor]
Reduction = Literal["mean", "sum"]


def sample_scores(
    measure: Measure,
    task: Task,
    states: Tensor,
    labels: Tensor,
    head: Head,
    *,
    problem: Problem | None = None,
    reduction: Reduction = "mean",
    max_positions: int | None = None,
    positions: Tensor | None = None,
    chunk_tokens: int | None = None,
) -> Tensor:
    """A measure of every sample of any task.

    Args:
        measure: What is read off the logits.
        task: What the labels mean.
        states: What enters the head: ``(R, T, D)`` by token, ``(R, D)`` or what its head takes in classification. Tasks
            without a head have the logits here, of question answering ``(R, 2, T)``, and CTC its losses ``(R,)``.
        labels: ``(R, T)`` by token; of question answering the positions of start and end ``(R, 2)``; or ``(R, ...)``.
        head: From states to logits.
        problem: Kind of the labels of a classification.
        reduction: Mean or sum over the labelled positions of a sample.
        max_positions: Labelled positions of a sample that are read at most.
        positions: Those positions, where they are known already.
        chunk_tokens: As in `token_scores`.

    Returns:
        float32 ``(R,)``; ``-inf`` for unlabelled samples, of which CTC has none.

    Raises:
        ValueError: As `token_scores` and `class_scores`, and for another measure than the loss in CTC.
    """
    if task == "sequence_classification":
        return class_scores(measure, head(states), labels, problem=problem)
    if task == "ctc":
        if measure != LOSS:
            raise ValueError(f"score={measure.name!r} needs a prediction of single labels, CTC has none. Use 'loss'.")
        return states.float()  # also of samples without labels: they are silence
    if task == "question_answering":
        logits = head(states)
        return token_scores(measure, logits, answers(labels, logits.size(-1)), lambda each: each, reduction=reduction)
    causal = task == "causal_lm"
    if positions is None and max_positions is not None:
        positions = positions_to_read(labels, causal=causal, max_positions=max_positions)
    return token_scores(
        measure,
        states,
        labels,
        head,
        causal=causal,
        reduction=reduction,
        positions=positions,
        chunk_tokens=chunk_tokens,
    )


def sample_sums(
    task: Task,
    states: Tensor,
    labels: Tensor,
    head: Head,
    *,
    problem: Problem | None = None,
    chunk_tokens: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The sum of every sample's losses, and how many they are: arguments as in `sample_scores`.

    Returns:
        float32 ``(R,)``, 0 for unlabelled samples, and float32 ``(R,)`` (1 where a sample has one loss).
    """
    sums = sample_scores(LOSS, task, states, labels, head, problem=problem, reduction="sum", chunk_tokens=chunk_tokens)
    if task in BY_TOKEN:
        counts = labelled_positions(labels, causal=task == "causal_lm").sum(dim=1)
    elif task == "question_answering":
        counts = labelled_positions(answers(labels, states.size(-1))).sum(dim=1)
    else:
        counts = sums != UNLABELLED
    return torch.where(counts > 0, sums, 0.0), counts.float()


def answers(labels: Tensor, length: int) -> Tensor:
    """Positions of starts and ends as class ids, by the rule of transformers: those behind the sequence are ignored.

    Example:
        >>> import torch
        >>> answers(torch.tensor([[2, 9], [-1, 7]]), length=8)
        tensor([[   2, -100],
                [   0,    7]])
    """
    return torch.where(labels >= length, IGNORED_LABEL, labels.clamp(min=0))


def token_scores(
    measure: Measure,
    hidden: Tensor,
    labels: Tensor,
    head: Head,
    *,
    causal: bool = False,
    reduction: Reduction = "mean",
    chunk_tokens: int | None = None,
    positions: Tensor | None = None,
) -> Tensor:
    r"""A measure of every sample over its labelled positions; for `earlysift.measures.LOSS` its cross entropy.

    ``score_i = mean over {t : labels[i, t] != -100} of measure(head(hidden[i, t]), labels[i, t])``

    Serves masked language modelling and token classification (``causal=False``) and causal language modelling
    (``causal=True``: the state at position t predicts the label at t + 1).

    Args:
        measure: What is read off the logits at a position.
        hidden: States that enter the head, ``(R, T, D)``, any floating dtype.
        labels: Class ids, ``(R, T)``; -100 marks positions without a label.
        head: Maps ``(n, D)`` to logits ``(n, V)``.
        causal: Whether position t predicts label t + 1.
        reduction: Mean or sum over the labelled positions of a sample.
        chunk_tokens: Positions that pass through the head at once; bounds memory at ``chunk_tokens * V`` floats. None
            is 1,024 on a CPU, and 4,096 on an accelerator, where every chunk costs the time to launch its kernels.
        positions: Positions that are read, from `positions_to_read` of the same labels; a sum is scaled up to all
            labelled ones. None reads all labelled positions.

    Returns:
        float32 ``(R,)``; ``-inf`` for samples without a labelled position.

    Raises:
        ValueError: If the shapes of ``hidden`` and ``labels`` do not belong together, or labels are not int64 or (on a
            CPU) out of range.

    Example:
        >>> import torch
        >>> from earlysift.measures import ENTROPY, LOSS
        >>> hidden, head = torch.zeros(2, 3, 4), torch.nn.Linear(4, 10, bias=False)
        >>> labels = torch.tensor([[-100, 7, -100], [-100, -100, -100]])
        >>> token_scores(LOSS, hidden, labels, head), token_scores(ENTROPY, hidden, labels, head)
        (tensor([2.3026,   -inf], grad_fn=<WhereBackward0>), tensor([2.3026,   -inf], grad_fn=<WhereBackward0>))
    """
    if hidden.ndim != 3 or labels.shape != hidden.shape[:2]:
        raise ValueError(
            f"Expected hidden states (R, T, D) and labels (R, T), got {tuple(hidden.shape)} and {tuple(labels.shape)}. "
            "Give one label per position, -100 where there is none."
        )
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction must be mean or sum, got {reduction!r}.")
    _require_class_ids(labels)
    if positions is None:
        if causal:  # without the last position, which predicts nothing, dense labels leave nothing to gather
            hidden, labels, causal = hidden[:, :-1], labels[:, 1:], False
        positions = positions_to_read(labels, causal=causal)
    targets = _targets(labels, causal)
    states, targets_read = hidden.flatten(0, 1), targets.flatten()
    if len(positions) < len(states):  # else there is nothing to leave out
        states, targets_read = states.index_select(0, positions), targets_read.index_select(0, positions)
    if chunk_tokens is None:
        chunk_tokens = _CHUNK_TOKENS_ON_CPU if hidden.device.type == "cpu" else _CHUNK_TOKENS
    values = torch.cat([measure.of_classes(head(h).float(), y) for h, y in _chunks(states, targets_read, chunk_tokens)])
    # Copies to distinct positions and sums along rows: the result depends neither on the chunk size nor, as atomic
    # adds would on a GPU, on the order in which threads arrive.
    labelled = targets_read != IGNORED_LABEL
    everywhere = torch.zeros(targets.numel(), dtype=torch.float32, device=hidden.device)
    total = everywhere.index_copy(0, positions, torch.where(labelled, values, 0.0)).view(targets.shape).sum(dim=1)
    read = everywhere.index_copy(0, positions, labelled.float()).view(targets.shape).sum(dim=1)
    counts = (targets != IGNORED_LABEL).sum(dim=1)
    reduced = total / read.clamp(min=1) if reduction == "mean" else total * (counts / read.clamp(min=1))
    return torch.where(counts == 0, UNLABELLED, reduced)


def class_scores(measure: Measure, logits: Tensor, labels: Tensor, *, problem: Problem | None = None) -> Tensor:
    """A measure of every sample in sequence (or image) classification and regression.

    Single label: the measure of the prediction. Multi label and regression: its mean over classes or outputs. A measure
    that reads targets leaves out classes and outputs whose target is -100.

    Args:
        measure: What is read off the logits; for `earlysift.measures.LOSS` cross entropy, binary cross entropy or the
            squared error.
        logits: ``(R, C)``, any floating dtype.
        labels: Class ids ``(R,)``; probabilities of all classes ``(R, C)`` (a single label that is not certain); 0/1
            indicators ``(R, C)``; or targets ``(R,)`` / ``(R, C)``. Class id -100, or a row of labels that are all
            -100, marks an unlabelled sample.
        problem: The kind of labels; found by `classification_problem` when None.

    Returns:
        float32 ``(R,)``; ``-inf`` for unlabelled samples.

    Raises:
        ValueError: If labels do not fit the logits, class ids are not int64 or (on a CPU) out of range, or the measure
            needs a predicted distribution and the problem is a regression.

    Example:
        >>> import torch
        >>> from earlysift.measures import LOSS
        >>> class_scores(LOSS, torch.zeros(2, 4), torch.tensor([3, -100]))
        tensor([1.3863,   -inf])
    """
    problem = _checked_problem(logits, labels, problem)
    logits = logits.float()
    if problem == "single_label" and is_soft(labels):
        values = measure.of_classes(logits, labels.to(logits.dtype))
        return torch.where((labels == IGNORED_LABEL).all(dim=-1), UNLABELLED, values)
    if problem == "single_label":
        _require_class_ids(labels)
        return torch.where(labels == IGNORED_LABEL, UNLABELLED, measure.of_classes(logits, labels))
    function = measure.of_indicators if problem == "multi_label" else measure.of_numbers
    if function is None:
        raise ValueError(
            f"score={measure.name!r} needs a predicted distribution, and a regression output has none. "
            "Use the loss-based score (score='loss') for regression."
        )
    targets = labels.reshape(logits.shape).float()
    values, labelled = function(logits, targets), targets != IGNORED_LABEL
    counted = labelled if measure.reads_targets else torch.ones_like(labelled)
    means = torch.where(counted, values, 0.0).sum(dim=-1) / counted.sum(dim=-1).clamp(min=1)
    return torch.where(labelled.any(dim=-1), means, UNLABELLED)


def is_soft(labels: Tensor) -> bool:
    """Whether single labels are probabilities of all classes ``(R, C)`` instead of class ids."""
    return labels.ndim == 2 and labels.is_floating_point()


def classification_problem(logits: Tensor, labels: Tensor) -> Problem:
    """Which kind of classification the labels belong to, by the rule transformers uses.

    One output is a regression; whole-number labels ``(R,)`` are class ids; everything else is multi label.

    Raises:
        ValueError: If labels fit none of them.
    """
    if logits.ndim != 2:
        raise ValueError(
            f"Expected logits (R, C) for classification, got shape {tuple(logits.shape)}. "
            "Set the task in the family row if the model predicts per position."
        )
    if logits.shape[1] == 1:
        return "regression"
    if labels.ndim == 1 and not labels.is_floating_point():
        return "single_label"
    if labels.shape == logits.shape:
        return "multi_label"
    raise ValueError(
        f"Labels of shape {tuple(labels.shape)} and dtype {labels.dtype} do not fit logits {tuple(logits.shape)}. "
        f"Expected whole numbers ({logits.shape[0]},) or indicators {tuple(logits.shape)}."
    )


def _checked_problem(logits: Tensor, labels: Tensor, problem: Problem | None) -> Problem:
    problem = problem or classification_problem(logits, labels)
    shapes = {} if is_soft(labels) else {"single_label": logits.shape[:1]}
    known = problem in get_args(Problem)
    if not known or labels.numel() != shapes.get(problem, logits.shape).numel() or len(labels) != len(logits):
        raise ValueError(
            f"Expected a problem of {', '.join(get_args(Problem))} and labels that fit logits {tuple(logits.shape)}, "
            f"got {problem!r} and labels {tuple(labels.shape)} of {labels.dtype}. Give one label per sample, or one "
            "per sample and class."
        )
    return problem


def labelled_positions(labels: Tensor, *, causal: bool = False) -> Tensor:
    """Which positions carry a label, as the head sees them: bool ``(R, T)``, or ``(R, T - 1)`` when causal."""
    return (labels[:, 1:] if causal else labels) != IGNORED_LABEL


def positions_to_read(labels: Tensor, *, causal: bool = False, max_positions: int | None = None) -> Tensor:
    """The positions whose states a loss needs, ``(N,)``, int64, each as ``T * row + position``.

    Args:
        labels: Class ids, ``(R, T)``; -100 marks positions without a label.
        causal: Whether position t predicts label t + 1.
        max_positions: K; then K (at most T) positions of every sample, labelled ones first, spread over its length, and
            the same in all samples that have all labels. Their number is known beforehand: shapes are fixed, and no
            accelerator is waited for. None gives all labelled positions.

    Raises:
        ValueError: If labels have another shape, or there is to be less than one position.

    Example:
        >>> import torch
        >>> labels = torch.tensor([[-100, 7, -100], [5, -100, 6]])
        >>> positions_to_read(labels), positions_to_read(labels, causal=True)
        (tensor([1, 3, 5]), tensor([0, 4]))
    """
    _require_class_ids(labels)
    if labels.ndim != 2:
        raise ValueError(
            f"Expected labels (R, T), one per position, got {tuple(labels.shape)}. Give -100 where there is none."
        )
    labelled = _targets(labels, causal) != IGNORED_LABEL
    if max_positions is None:
        return labelled.flatten().nonzero().squeeze(1)  # an accelerator is waited for
    if max_positions < 1:
        raise ValueError(f"max_positions must be at least 1 or None, got {max_positions}.")
    rows, length = labels.shape
    # Odd multiples modulo a power of two are a permutation whose first members lie far apart, whatever their number.
    spread = torch.arange(length, device=labels.device) * _FAR_APART % _SPREAD_OVER
    chosen = (spread + _SPREAD_OVER * labelled).topk(min(max_positions, length), dim=1, sorted=False).indices
    return (chosen + length * torch.arange(rows, device=labels.device)[:, None]).flatten()


def _targets(labels: Tensor, causal: bool) -> Tensor:
    """What every position is to predict, ``(R, T)``."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORED_LABEL) if causal else labels


def _chunks(states: Tensor, labels: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    # At least one (possibly empty) chunk, so that a pool without labels needs no case of its own.
    for start in range(0, max(len(labels), 1), size):
        yield states[start : start + size], labels[start : start + size]


def _require_class_ids(labels: Tensor) -> None:
    if labels.dtype != torch.int64:
        raise ValueError(f"Expected labels of dtype torch.int64 (class ids), got {labels.dtype}. Use labels.long().")

"""Judging scores: whether a batch can be chosen by them, and what to warn the user about."""

import logging
import reprlib
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from earlysift import checks, controller, losses, pending
from earlysift.options import whole
from earlysift.pending import Pending

_LOG = logging.getLogger("earlysift")
_LEVEL = 4  # from here to the line that called `Sifter.sift`


class Unusable(ValueError):
    """Too few of a pool's scores are finite, so that nothing can be selected by them."""


class Counted(NamedTuple):
    """The scores of a step: how many there are, how many to keep, and how many are ``unlabelled``, ``non_finite``.

    The two counts are pending where an accelerator has yet to make them.
    """

    step: int
    size: int
    kept: int
    counts: dict[str, Any]

    def is_pending(self) -> bool:
        """Whether an accelerator has yet to count."""
        return any(isinstance(number, Pending) for number in self.counts.values())


def count(scores: Tensor) -> dict[str, Any]:
    """How many scores are ``unlabelled``, and how many ``non_finite``; pending on an accelerator."""
    unlabelled = scores == losses.UNLABELLED
    broken = ~(torch.isfinite(scores) | unlabelled)
    return {"unlabelled": pending.number(unlabelled.sum()), "non_finite": pending.number(broken.sum())}


def number_kept(size: int, keep: float, known: int | None) -> int:
    """b, of a pool of so many candidates: all, what is known, or the share."""
    return size if keep == 1 else known or max(1, round(keep * size))


def require_kept(size: int, keep: float, known: int | None, *, first: bool) -> int:
    """How many candidates of a pool are kept; refuses a pool that has too few.

    Args:
        size: R.
        keep: Share that is kept.
        known: b, if earlier pools or the configuration have fixed it.
        first: Whether it is the first pool.

    Raises:
        ValueError: If the pool is empty, or the first one has fewer than b candidates.
    """
    kept = number_kept(size, keep, known)
    if size < kept and first:
        raise ValueError(
            f"Expected at least {kept} candidates (the number kept) in the first pool, got {size}. "
            "Use a larger pool, or keep fewer."
        )
    if size < kept and size == 0:
        raise ValueError("Expected at least one candidate, got 0. Leave empty batches out.")
    return kept


def require_micro_step(micro_step: object) -> int:
    """The number of a pool within its step, as a plain number.

    Raises:
        ValueError: If it is none.
    """
    if not whole(micro_step, 0):
        raise ValueError(
            f"micro_step must be a whole number of at least 0, got {reprlib.repr(micro_step)}. It is the number of "
            "the pool within its optimizer step."
        )
    return int(cast(int, micro_step))


def require_training(model: nn.Module) -> None:
    """Refuse a model in evaluation mode, which a loop has forgotten to end."""
    if not model.training:
        raise ValueError(
            "The model is in evaluation mode, which a training step does not expect. "
            "Call model.train() before the loop and after every evaluation."
        )


def require_scores(scores: object, size: int) -> Tensor:
    """Refuse what a scorer returned if it is not one real number per candidate.

    Raises:
        ValueError: Says what came instead.
    """
    if isinstance(scores, Tensor) and scores.shape == (size,) and not scores.is_complex():
        return scores.detach()
    received = f"{tuple(scores.shape)} of {scores.dtype}" if isinstance(scores, Tensor) else type(scores).__name__
    raise ValueError(
        f"Expected scores of shape ({size},), one per candidate, got {received}. "
        "A scorer returns a tensor with one real number per row of the pool."
    )


def require_usable(counted: Counted, before: Mapping[str, int], *, late: bool = False) -> None:
    """Raise if too few scores are usable; warn of those that say that something is wrong.

    Args:
        counted: The scores; their counts have arrived.
        before: Counts of the steps before: what was warned of is not warned of again.
        late: Whether other pools may have come since.

    Raises:
        ValueError: If no candidate is labelled.
        Unusable: If fewer scores are finite than are to be kept.
    """
    at = f" at step {counted.step}" if late else ""
    unlabelled, broken = counted.counts["unlabelled"], counted.counts["non_finite"]
    if unlabelled == counted.size:
        raise ValueError(
            f"None of the {counted.size} candidates{at} has a labelled position (all labels are "
            f"{losses.IGNORED_LABEL}). Check the collator: training on this pool would give a loss of nan."
        )
    if counted.size - broken < counted.kept:
        raise Unusable(
            f"Expected at least {counted.kept} candidates with a finite score, got {counted.size - broken} of "
            f"{counted.size} at step {counted.step}: {broken} are nan or inf. Look for nan in the inputs, or for "
            "weights that have diverged."
        )
    if broken and not before["non_finite"]:
        warnings.warn(
            f"{broken} of {counted.size} scores are nan or inf at step {counted.step}; such candidates are never "
            "selected. Sifter.stats() goes on counting them.",
            stacklevel=_LEVEL,
        )
    labelled = counted.size - broken - unlabelled
    if labelled < counted.kept and not before["unlabelled"]:
        warnings.warn(
            f"Only {labelled} of {counted.size} candidates have a labelled position, fewer than the {counted.kept} "
            f"kept, at step {counted.step}; the batch is filled up with unlabelled ones.",
            stacklevel=_LEVEL,
        )


def broken_probes(correlation: float, step: int, depth: int, before: int) -> int:
    """Count probes in a row whose exit ranks at random or backwards; the second one is warned of.

    Args:
        correlation: Rank correlation of the probe.
        step: Its step; at the first one an untrained exit says nothing yet.
        depth: The exit.
        before: Such probes in a row until now.
    """
    if step == 0 or correlation >= controller.LEAST_CORRELATION:
        return 0
    if before == 1:  # once is chance
        _LOG.warning(
            "step %d: the exit at depth %d ranks at random or backwards (rank correlation %.2f): selection costs "
            "and cannot gain. Use mode='auto', train an ExitHead, or end selection by a schedule.",
            step,
            depth,
            correlation,
        )
    return before + 1


def mention_partial(step: int, size: int, kept: int) -> None:
    """Tell the user of a pool with fewer candidates than are kept."""
    _LOG.warning(
        "step %d: the %d candidates of a pool are fewer than the %d kept: all are trained on. Said once.",
        step,
        size,
        kept,
    )


def mention_unread_weights() -> None:
    """Warn of a loop that draws candidates in proportion and does not weigh them."""
    _LOG.warning(
        "Candidates are drawn in proportion to their scores, and nobody has read their weights, without which training "
        "prefers large losses as greedy selection does, only less surely. Train on sifter.loss(batch, "
        "weights=sifter.weights), or multiply the losses of samples by sifter.weights."
    )


def mention_batch_norms(model: nn.Module) -> None:
    """Tell the user of norms that learn from selected samples what evaluation will apply to all."""
    if names := [name for name, norm in checks.batch_norms(model).items() if norm.training]:
        _LOG.warning(
            "BatchNorm in training mode (%s) will evaluate with the statistics of the selected samples. Call .eval() "
            "on these modules after model.train(), or use another norm.",
            ", ".join(names),
        )

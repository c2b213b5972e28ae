"""Scorers: (model, pool) to one score per candidate, shape ``(R,)``, larger meaning more worth training on.

A scorer is any callable ``(model, pool) -> Tensor (R,)``; a lambda is a full citizen. Those here run under ``no_grad``
(never ``inference_mode``, whose tensors poison caches that models build lazily), in evaluation mode with every
module's own flag restored, a chunk of rows at a time, in bfloat16 where the hardware has it, and draw from no global
generator.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor, nn

from earlysift import checks, exits, losses, pools
from earlysift.exits import Anatomy, Family
from earlysift.losses import Reduction
from earlysift.seeds import reseeded

Scorer = Callable[[nn.Module, Any], Tensor]

AUTO_DTYPE = "auto"


def early_exit_loss(
    model: nn.Module,
    pool: Any,
    *,
    depth: int = 1,
    family: Family | None = None,
    exit_head: nn.Module | None = None,
    reduction: Reduction = "mean",
    max_positions: int | None = None,
    chunk_rows: int | None = None,
    trim: bool = False,
    dtype: torch.dtype | str | None = AUTO_DTYPE,
) -> Tensor:
    """Loss of every candidate at the exit after ``depth`` layers: loss-based SIFT.

    Args:
        model: The model, wrapped or not; left as it was.
        pool: Pool of R candidates with labels.
        depth: Layers that run; the model's own final norm and head follow.
        family: A row for a model that `earlysift.exits.FAMILIES` does not know.
        exit_head: Module behind the exit, if any.
        reduction: Mean or sum over the labelled positions of a sample.
        max_positions: Labelled positions of a sample that are read at most, see
            `earlysift.losses.positions_to_read`.
        chunk_rows: Candidates that run at once; bounds memory. None runs the whole pool at once.
        trim: Whether candidates of like length run together, without the padding that none of them needs.
        dtype: Autocast dtype while scoring; ``"auto"`` is bfloat16 where the hardware computes in it, None leaves
            autocast as it is.

    Returns:
        float32 ``(R,)``, ``-inf`` for unlabelled samples.

    Example:
        >>> import torch
        >>> from earlysift.exits import Family
        >>> model = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), nn.Linear(4, 3))
        >>> pool = (torch.zeros(5, 4), torch.tensor([0, 1, 2, 0, 1]))
        >>> early_exit_loss(model, pool, family=Family("0", task="sequence_classification")).shape
        torch.Size([5])

    Reference:
        Das et al., SIFT, ICML 2024, arXiv 2402.07052 (loss-based early exit).
    """
    return _scores(
        model,
        pool,
        losses.token_losses,
        losses.class_losses,
        depth=depth,
        family=family,
        exit_head=exit_head,
        reduction=reduction,
        max_positions=max_positions,
        chunk_rows=chunk_rows,
        trim=trim,
        dtype=dtype,
    )


def early_exit_entropy(
    model: nn.Module,
    pool: Any,
    *,
    depth: int = 1,
    family: Family | None = None,
    exit_head: nn.Module | None = None,
    reduction: Reduction = "mean",
    max_positions: int | None = None,
    chunk_rows: int | None = None,
    trim: bool = False,
    dtype: torch.dtype | str | None = AUTO_DTYPE,
) -> Tensor:
    """Entropy of every candidate's prediction at the exit after ``depth`` layers: entropy-based SIFT.

    Arguments and returns as in `early_exit_loss`; the labels only tell which positions count.

    Reference:
        Das et al., SIFT, ICML 2024, arXiv 2402.07052 (entropy-based early exit).
    """
    return _scores(
        model,
        pool,
        losses.token_entropies,
        losses.class_entropies,
        depth=depth,
        family=family,
        exit_head=exit_head,
        reduction=reduction,
        max_positions=max_positions,
        chunk_rows=chunk_rows,
        trim=trim,
        dtype=dtype,
    )


def exact_loss(
    model: nn.Module,
    pool: Any,
    *,
    family: Family | None = None,
    reduction: Reduction = "mean",
    chunk_rows: int | None = None,
    trim: bool = False,
    dtype: torch.dtype | str | None = AUTO_DTYPE,
) -> Tensor:
    """Loss of every candidate under the full model: what early exit approximates, at full forward cost.

    Arguments and returns as in `early_exit_loss`.
    """
    return _scores(
        model,
        pool,
        losses.token_losses,
        losses.class_losses,
        depth=None,
        family=family,
        exit_head=None,
        reduction=reduction,
        max_positions=None,
        chunk_rows=chunk_rows,
        trim=trim,
        dtype=dtype,
    )


def random_scores(model: nn.Module, pool: Any, *, generator: Generator) -> Tensor:
    """Uniform random scores, whatever the model: greedy selection on them is uniform sampling.

    Example:
        >>> import torch
        >>> random_scores(nn.Identity(), torch.zeros(3, 2), generator=torch.Generator().manual_seed(0)).shape
        torch.Size([3])
    """
    return torch.rand(pools.pool_size(pool), generator=generator, device=generator.device)


def guarded(score: Scorer, model: nn.Module, pool: Any, *, key: tuple[int | str, ...]) -> Tensor:
    """Call a scorer of the user's own as those here run: no gradients, evaluation mode, no global random state touched.

    Args:
        score: The scorer.
        model: The model; every module's training flag is restored.
        pool: Pool of R candidates.
        key: What the random numbers that the scorer may draw from global generators depend on.

    Returns:
        What the scorer returned.
    """
    device = next(model.parameters(), torch.empty(0)).device
    with torch.no_grad(), exits.scoring_mode(model), reseeded(*key, device=device):
        return score(model, pool)


def training_loss(
    model: nn.Module,
    batch: Any,
    *,
    depth: int | None = None,
    family: Family | None = None,
    exit_head: nn.Module | None = None,
    detach_exit: bool = False,
    weights: Tensor | None = None,
    items: Tensor | float | None = None,
    chunk_tokens: int = 1 << 30,
) -> Tensor:
    """Differentiable loss of a batch, through the head on labelled positions only.

    Equal to the model's own loss (the mean over all labelled positions, or over samples in classification) to rounding,
    without the logits of positions that carry no label. With ``depth`` it is the loss of the early exit, to be trained
    jointly. The first call compares it with the model's own loss on two rows (`earlysift.checks.verified`).

    Args:
        model: The model, wrapped or not, in training mode.
        batch: Batch of b samples with labels.
        depth: Exit after this many layers; None is the full model.
        family: A row for a model that `earlysift.exits.FAMILIES` does not know.
        exit_head: Module behind the exit, if any.
        detach_exit: Whether gradients of the exit stop at the exit head.
        weights: Weight of every sample, ``(b,)`` (unbiased selection); None weighs every labelled position alike.
        items: What to divide the sum by, where a step has more batches than this one (accumulation, several processes);
            None is the number of labelled positions of this batch.
        chunk_tokens: Positions that pass through the head at once.

    Returns:
        A float32 scalar.

    Raises:
        ValueError: If labels are no class ids of this model, or the model's own loss is another one.
    """
    anatomy = checks.verified(model, batch, family)
    inputs, labels = pools.inputs_and_labels(batch)
    with ExitStack() as stack:
        if depth is not None:
            stack.enter_context(exits.shortened(anatomy, depth, exit_head=exit_head, detach_exit=detach_exit))
        if anatomy.task == "sequence_classification":
            logits = exits.call(model, inputs, synchronized=depth is None)
            per_sample = losses.class_losses(logits, labels, problem=checks.problem_of(anatomy))
            counts = (per_sample != losses.UNLABELLED).float()
        else:
            with exits.headless(anatomy):
                hidden = exits.call(model, inputs, synchronized=depth is None)
            causal = anatomy.task == "causal_lm"
            per_sample = losses.token_losses(
                hidden,
                labels,
                exits.head_of(anatomy),
                causal=causal,
                reduction="sum",
                chunk_tokens=chunk_tokens,
            )
            counts = losses.labelled_positions(labels, causal=causal).sum(dim=1).float()
    per_sample = torch.where(counts > 0, per_sample, 0.0)
    if weights is not None:
        per_sample = per_sample * weights
    return per_sample.sum() / (counts.sum().clamp(min=1) if items is None else items)


class Predictions(NamedTuple):
    """The labelled predictions of a batch of R samples, sample by sample: n predictions among V tokens or classes.

    ``logits`` float32 ``(n, V)``, ``targets`` int64 ``(n,)``, and ``counts`` int64 ``(R,)``: how many each sample has.
    """

    logits: Tensor
    targets: Tensor
    counts: Tensor


def predictions(model: nn.Module, batch: Any, *, family: Family | None = None) -> Predictions:
    """Run the model on a batch, its head on labelled positions only.

    Args:
        model: The model, wrapped or not, in the mode that it is to run in.
        batch: Batch of R samples with labels; classes, not indicators or numbers.
        family: A row for a model that `earlysift.exits.FAMILIES` does not know.
    """
    anatomy = checks.verified(model, batch, family)
    inputs, labels = pools.inputs_and_labels(batch)
    if anatomy.task == "sequence_classification":
        logits = exits.call(model, inputs, synchronized=True)
        return Predictions(logits.float(), labels, torch.ones_like(labels))
    with exits.headless(anatomy):
        hidden = exits.call(model, inputs, synchronized=True)
    if anatomy.task == "causal_lm":
        hidden, labels = hidden[:, :-1], labels[:, 1:]
    labelled = losses.labelled_positions(labels)
    logits = exits.head_of(anatomy)(hidden[labelled]).float()
    return Predictions(logits, labels[labelled], labelled.sum(dim=1))


def scoring_dtype(device: torch.device) -> torch.dtype | None:
    """bfloat16 where the device computes in it natively, else None (autocast left as it is)."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else None
    if device.type == "cpu":
        able = torch.cpu.get_capabilities()
        return torch.bfloat16 if able.get("avx512_bf16") or able.get("amx_bf16") else None
    return None


def _scores(
    model: nn.Module,
    pool: Any,
    per_token: Callable[..., Tensor],
    per_class: Callable[..., Tensor],
    *,
    depth: int | None,
    family: Family | None,
    exit_head: nn.Module | None,
    reduction: Reduction,
    max_positions: int | None,
    chunk_rows: int | None,
    trim: bool,
    dtype: torch.dtype | str | None,
) -> Tensor:
    anatomy = checks.as_compared(exits.find_anatomy(model, family))
    size = pools.pool_size(pool)
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"chunk_rows must be at least 1 or None, got {chunk_rows}.")
    rows = chunk_rows or size
    skips_unlabelled = exits.skips_unlabelled(model, anatomy, max_positions)
    order = pools.by_length(pool) if trim else None
    if order is not None:
        pool = pools.take(pool, order)
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(precision(anatomy, dtype))
        if depth is not None:
            stack.enter_context(exits.shortened(anatomy, depth, exit_head=exit_head))
        stack.enter_context(exits.scoring_mode(model))  # of the short model: walking the other layers takes time
        scores = []
        for start in range(0, size, rows):
            chunk = pools.take(pool, slice(start, start + rows))
            inputs, labels = pools.inputs_and_labels(chunk if order is None else pools.trim_padding(chunk))
            if anatomy.task == "sequence_classification":
                scores.append(per_class(exits.call(model, inputs), labels, problem=checks.problem_of(anatomy)))
                continue
            causal = anatomy.task == "causal_lm"
            places = losses.positions_to_read(labels, causal=causal, max_positions=max_positions)
            with ExitStack() as at_exit:
                at_exit.enter_context(exits.headless(anatomy))
                if depth is not None and skips_unlabelled:
                    at_exit.enter_context(exits.at_positions(anatomy, depth, places, labels.shape))
                hidden = exits.call(model, inputs)
            head = exits.head_of(anatomy)
            scores.append(per_token(hidden, labels, head, causal=causal, reduction=reduction, places=places))
        found = torch.cat(scores)
        return found if order is None else torch.empty_like(found).index_copy(0, order, found)


def precision(anatomy: Anatomy, dtype: torch.dtype | str | None) -> AbstractContextManager[Any]:
    """Autocast as scoring wants it on the model's device."""
    device = next(anatomy.core.parameters()).device
    chosen = scoring_dtype(device) if dtype == AUTO_DTYPE else dtype
    if chosen is None:
        return nullcontext()
    if not isinstance(chosen, torch.dtype):
        raise ValueError(f"dtype must be a torch.dtype, 'auto' or None, got {dtype!r}.")
    return torch.autocast(device.type, dtype=chosen)

"""Probes: one forward pass of a pool gives exact losses, scores at several exits, and where its gradients point.

What a probe measures decides whether selection pays (`earlysift.controller`). It is charged like everything else.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from earlysift import checks, exits, losses, pools, scorers
from earlysift.exits import Anatomy, Family
from earlysift.losses import Head, Reduction

Signal = Literal["loss", "entropy"]


class Probe(NamedTuple):
    """What one probe saw of a pool of R candidates.

    Attributes:
        exact: Exact losses, float32 ``(R,)``.
        scores: Depth to the scores at that exit, float32 ``(R,)``.
        gram: Inner products of the candidates' gradients, float64 ``(R, R)``; zero where a loss is not finite.
    """

    exact: Tensor
    scores: dict[int, Tensor]
    gram: Tensor


def probe(
    model: nn.Module,
    pool: Any,
    *,
    depths: Sequence[int],
    signal: Signal = "loss",
    family: Family | None = None,
    exit_head: nn.Module | None = None,
    reduction: Reduction = "mean",
    max_positions: int | None = None,
    chunk_rows: int | None = None,
    dtype: torch.dtype | str | None = scorers.AUTO_DTYPE,
) -> Probe:
    r"""Exact losses, scores at several depths and inner products of gradients, from one forward pass.

    The outputs of the layers at ``depths`` are kept on the way and handed through the model's own final norm and head,
    so every further exit costs a head, not a layer. The gradient of sample i is that of a linear map in front of
    the head, at the identity: ``G_i = sum over t of delta_it h_it^T`` with the states h that enter the head and
    ``delta = d loss / d h``. It stands for the whole model's, needs no backward pass through layers, and is exact for a
    last linear layer.

    Args:
        model: The model, wrapped or not; left as it was.
        pool: Pool of R candidates with labels.
        depths: Exits to score at.
        signal: Loss or entropy at the exits.
        family: A row for a model that `earlysift.exits.FAMILIES` does not know; its head must be named.
        exit_head: Module behind the exits, if any.
        reduction: Mean or sum over the labelled positions of a sample.
        max_positions: Labelled positions of a sample that the exits read at most; the exact losses read all.
        chunk_rows: Candidates that run at once; None runs the whole pool.
        dtype: Autocast dtype, see `earlysift.scorers.early_exit_loss`.

    Returns:
        The probe. Memory: R times the square of the model's width.

    Raises:
        ValueError: If the model's head has no name, so that no states enter it.

    Example:
        >>> net = nn.Module()
        >>> net.layers, net.head = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), nn.Linear(4, 3)
        >>> net.forward = lambda x: net.head(net.layers(x))
        >>> seen = probe(net, (torch.ones(5, 4), torch.tensor([0, 1, 2, 0, 1])), depths=[1],
        ...              family=Family("layers", (("head",),), task="sequence_classification"))
        >>> seen.exact.shape, list(seen.scores), seen.gram.shape
        (torch.Size([5]), [1], torch.Size([5, 5]))

    Reference:
        Gradients of the last layer as a stand-in: Katharopoulos and Fleuret, 2018, arXiv 1803.00942. The replay of
        exits and the use of inner products are ours.
    """
    anatomy = with_head(checks.as_compared(exits.find_anatomy(model, family)))
    head = exits.head_of(anatomy)  # before the head is taken out of the model
    size = pools.pool_size(pool)
    rows = chunk_rows or size
    exact, gradients = [], []
    scores: dict[int, list[Tensor]] = {depth: [] for depth in depths}
    with ExitStack() as stack:
        stack.enter_context(exits.uncompiled())  # for a few passes, compiling would cost more than it saves
        stack.enter_context(exits.scoring_mode(model))
        stack.enter_context(scorers.precision(anatomy, dtype))
        if exit_head is not None:
            stack.enter_context(exits.scoring_mode(exit_head))
        stack.enter_context(exits.headless(anatomy))
        for start in range(0, size, rows):
            inputs, labels = pools.inputs_and_labels(pools.take(pool, slice(start, start + rows)))
            with torch.no_grad():
                with exits.captured(anatomy, max(depths)) as outputs:
                    states = exits.call(model, inputs)
                for depth in depths:
                    with exits.replayed(anatomy, outputs[:depth], exit_head=exit_head):
                        at_exit = exits.call(model, inputs)
                    scores[depth].append(_per_sample(anatomy, head, at_exit, labels, signal, reduction, max_positions))
            per_sample, gradient = _losses_and_gradients(anatomy, head, states, labels, reduction)
            exact.append(per_sample)
            gradients.append(gradient)
    by_sample = torch.cat(gradients).double()
    return Probe(
        torch.cat(exact), {depth: torch.cat(parts) for depth, parts in scores.items()}, by_sample @ by_sample.T
    )


def with_head(anatomy: Anatomy) -> Anatomy:
    """The anatomy with the modules that states enter as its head, behind pooling if need be.

    Raises:
        ValueError: If they have no name in the family row.
    """
    if not (anatomy.head or anatomy.classifier):
        raise ValueError(
            f"Expected a family row that names the head of {type(anatomy.core).__name__}, got none. Probes look at the "
            "states that enter the head: Family(layers=..., heads=((...),))."
        )
    return anatomy._replace(head=anatomy.head or anatomy.classifier)


def _per_sample(
    anatomy: Anatomy,
    head: Head,
    states: Tensor,
    labels: Tensor,
    signal: Signal,
    reduction: Reduction,
    max_positions: int | None,
) -> Tensor:
    if anatomy.task == "sequence_classification":
        per_class = losses.class_losses if signal == "loss" else losses.class_entropies
        return per_class(head(states), labels, problem=checks.problem_of(anatomy))
    per_token = losses.token_losses if signal == "loss" else losses.token_entropies
    causal = anatomy.task == "causal_lm"
    places = losses.positions_to_read(labels, causal=causal, max_positions=max_positions)
    return per_token(states, labels, head, causal=causal, reduction=reduction, places=places)


def _losses_and_gradients(
    anatomy: Anatomy, head: Head, states: Tensor, labels: Tensor, reduction: Reduction
) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        entering = states.detach().requires_grad_()
        per_sample = _per_sample(anatomy, head, entering, labels, "loss", reduction, None)
        finite = torch.isfinite(per_sample)
        (delta,) = torch.autograd.grad(torch.where(finite, per_sample, 0.0).sum(), entering)
    rows = len(labels)
    # Heads that pool inside get states per position, others one state per sample.
    delta, entering = (t.reshape(rows, -1, t.shape[-1]).float() for t in (delta, entering.detach()))
    gradient = torch.einsum("rtd,rte->rde", delta, entering).flatten(1)
    return per_sample.detach(), torch.where(finite[:, None], gradient, 0.0)

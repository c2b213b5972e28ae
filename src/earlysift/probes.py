"""Probes: one forward pass of a pool gives exact losses, scores at several exits, and where its gradients point.

What a probe measures decides whether selection pays (`earlysift.controller`). It is charged like everything else.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from earlysift import checks, costs, exits, families, losses, passes, pools, scorers, selectors
from earlysift.anatomy import Anatomy
from earlysift.control import Control, scored_depths
from earlysift.fidelity import gain, rank_correlation
from earlysift.loss_memory import unseen_first
from earlysift.measures import LOSS, Measure
from earlysift.recent import MEMORY
from earlysift.trained_pool import EXACT, TrainedPool

Record = dict[str, float]
"""Numbers of one probe, by name; what they promise is for `earlysift.payoffs`."""


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
    measure: Measure = LOSS,
    **options: Any,
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
        measure: What is read off the predictions at the exits.
        options: Those of `earlysift.scorers.Scoring`; a row of a family must name its head. Exact losses read all
            labelled positions, and nothing is trimmed.

    Returns:
        The probe. Memory: R times the square of the model's width.

    Raises:
        ValueError: If the model's head has no name, so that no states enter it.

    Example:
        >>> from earlysift.families import Family
        >>> net = nn.Module()
        >>> net.layers, net.head = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), nn.Linear(4, 3)
        >>> net.forward = lambda x: net.head(net.layers(x))
        >>> found = probe(net, (torch.ones(5, 4), torch.tensor([0, 1, 2, 0, 1])), depths=[1],
        ...              family=Family("layers", (("head",),), task="sequence_classification"))
        >>> found.exact.shape, list(found.scores), found.gram.shape
        (torch.Size([5]), [1], torch.Size([5, 5]))

    Reference:
        Gradients of the last layer as a stand-in: Katharopoulos and Fleuret, 2018, arXiv 1803.00942. The replay of
        exits and the use of inner products are ours.
    """
    scoring, pool = scorers.Scoring(**options), pools.checked(pool)
    anatomy = with_head(checks.usable(model, pool.data, scoring.family))
    head = passes.head_of(anatomy)  # before the head is taken out of the model
    classifies = anatomy.task == "sequence_classification"
    rows = scoring.chunk_rows or pool.size
    per_sample = partial(
        losses.sample_scores,
        task=anatomy.task,
        head=head,
        problem=checks.problem_of(anatomy),
        reduction=scoring.reduction,
    )
    exact, gradients = [], []
    scores: dict[int, list[Tensor]] = {depth: [] for depth in depths}
    with ExitStack() as stack:
        stack.enter_context(passes.uncompiled())  # for a few passes, compiling would cost more than it saves
        stack.enter_context(passes.scoring_mode(model))
        stack.enter_context(scorers.precision(anatomy, scoring.dtype))
        if scoring.exit_head is not None:
            stack.enter_context(passes.scoring_mode(scoring.exit_head))
        stack.enter_context(exits.headless(anatomy))
        for start in range(0, pool.size, rows):
            candidates = pool.take(slice(start, start + rows)).data
            inputs, labels = pools.inputs_and_labels(candidates, anatomy.labels)
            with torch.no_grad():
                with exits.captured(anatomy, max(depths)) as outputs:
                    states = passes.call(model, inputs)
                for depth in depths:
                    by_probe = scoring.learnt.probes.get(depth) if classifies else None
                    if by_probe is not None and by_probe.is_taught:
                        classes = head(states[:1]).size(-1)
                        told = scorers.losses_by_probe(anatomy, by_probe, outputs[depth], candidates, classes)
                        scores[depth].append(told)
                        continue
                    with exits.replayed(anatomy, list(outputs.values())[:depth], exit_head=scoring.exit_head):
                        at_exit = passes.call(model, inputs)
                    scores[depth].append(
                        per_sample(measure, states=at_exit, labels=labels, max_positions=scoring.max_positions)
                    )
            loss, gradient = _losses_and_gradients(per_sample, states, labels)
            exact.append(loss)
            gradients.append(gradient)
    by_sample = torch.cat(gradients).double()
    return Probe(
        torch.cat(exact), {depth: torch.cat(parts) for depth, parts in scores.items()}, by_sample @ by_sample.T
    )


def of_trained(pool: TrainedPool) -> Probe:
    """What a probe would have seen of the candidates of a pool, from what they showed when they were trained on.

    Differences from `probe`: the weights moved a little between batches, dropout was on, an exit is told by its probe
    before that learnt from the batch, and gradients are those of the last layer's weights.
    """
    columns = pool.columns()
    scores = {int(name): column for name, column in columns.items() if name.isdecimal()}
    if MEMORY in scores:
        scores[MEMORY] = unseen_first(scores[MEMORY])
    return Probe(columns[EXACT], scores, pool.gram())


def with_head(anatomy: Anatomy) -> Anatomy:
    """The anatomy with the modules that states enter as its head, behind pooling if need be.

    Raises:
        ValueError: If they have no name in the family row.
    """
    if families.is_encoder_decoder(anatomy.core):
        raise ValueError(
            f"{type(anatomy.core).__name__} is an encoder-decoder. Probes and auto mode read all exits off one full "
            "pass, in which its encoder is not cut. Use mode='fixed'."
        )
    if families.has_stages(anatomy.core):
        raise ValueError(
            f"{type(anatomy.core).__name__} has stages, whose states its head cannot read, but auto mode reads exits "
            "by it until their probes have learnt. Use mode='fixed' with score='probe'."
        )
    if not (anatomy.head or anatomy.classifier):
        raise ValueError(
            f"Expected a family row that names the head of {type(anatomy.core).__name__}, got none. Probes look at the "
            "states that enter the head: Family(layers=..., heads=((...),))."
        )
    return anatomy._replace(head=anatomy.head or anatomy.classifier)


def _losses_and_gradients(per_sample: Callable[..., Tensor], states: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        entering = states.detach().requires_grad_()
        loss = per_sample(LOSS, states=entering, labels=labels)
        finite = torch.isfinite(loss)
        (delta,) = torch.autograd.grad(torch.where(finite, loss, 0.0).sum(), entering)
    rows = len(labels)
    # Heads that pool inside get states per position, others one state per sample.
    delta, entering = (t.reshape(rows, -1, t.shape[-1]).float() for t in (delta, entering.detach()))
    gradient = torch.einsum("rtd,rte->rde", delta, entering).flatten(1)
    return loss.detach(), torch.where(finite[:, None], gradient, 0.0)


def record(probe: Probe, kept: int, control: Control) -> Record:
    r"""The numbers of one probe, or of a pool that was trained on.

    For a rule with weights w over the candidates (sum 1) and gradients g: ``signal = sum_i w_i <g_i, mean of the other
    candidates' g>``, the part of the step that goes along the mean gradient, and ``length2 = |sum_i w_i g_i|^2``; both
    relative to the mean ``|g_i|^2``. Uniform batches have them in closed form, and so has the unbiased rule, whose
    signal is uniform's.

    Args:
        probe: What the probe measured.
        kept: b.
        control: What may be chosen.

    Returns:
        ``uniform.signal``, ``uniform.length2``; for each depth ``correlation.{depth}``, for each depth and keep
        ``gain.{depth}.{keep}``, ``greedy...signal``, ``greedy...length2`` and ``unbiased...length2``; ``floor``, the
        largest loss over the mean one (an upper estimate of M* / F in T1); ``concentration``, the mean square of the
        exact losses over their squared mean; and ``loss``, the pool's mean exact loss, with its standard error
        ``loss_error``. All are nan if fewer than two candidates have a finite loss, or none has a gradient.
    """
    finite = torch.isfinite(probe.exact)
    for scores in probe.scores.values():
        finite &= torch.isfinite(scores)
    exact, gram = probe.exact[finite], probe.gram[finite][:, finite]
    total = len(exact)
    if total < 2 or not float(gram.diagonal().sum()) > 0:
        return dict.fromkeys(record_names(control), math.nan)
    kept = min(kept, total)
    gram = gram / gram.diagonal().mean()
    squares = gram.diagonal()
    others = (gram.sum(dim=1) - squares) / (total - 1)
    signal = others.mean().item()
    numbers = {
        "uniform.signal": signal,
        "uniform.length2": signal * (1 - 1 / kept) + 1 / kept,
        "floor": (exact.max() / exact.mean()).item(),
        "concentration": 1 / costs.second_moment_ratio(exact.clamp(min=0)),
        "loss": exact.mean().item(),
        "loss_error": exact.std().item() / math.sqrt(total),
    }
    for depth, all_scores in probe.scores.items():
        scores = all_scores[finite]
        for keep in control.keeps:
            rows = min(total, round(kept / keep))
            best = selectors.greedy(scores[:rows], min(kept, rows)).indices
            numbers[f"gain.{depth}.{keep:g}"] = gain(exact[:rows], best)
            name = f"{depth}.{keep:g}"
            numbers[f"greedy.{name}.signal"] = others[best].mean().item()
            numbers[f"greedy.{name}.length2"] = gram[best][:, best].mean().item()
            included = selectors.inclusion_probabilities(scores[:rows].clamp(min=0), min(kept, rows))
            noise = (squares[:rows] / squares[:rows].mean().clamp(min=1e-12) / included).sum().item() / rows**2
            numbers[f"unbiased.{name}.length2"] = signal * (1 - 1 / kept) + noise
        numbers[f"correlation.{depth}"] = rank_correlation(scores, exact)
    return numbers


def record_names(control: Control) -> list[str]:
    """The names of a record's numbers: the same on every rank, whatever its pool."""
    depths = scored_depths(control)
    pairs = [f"{depth}.{keep:g}" for depth in depths for keep in control.keeps]
    parts = ("greedy.{}.signal", "greedy.{}.length2", "unbiased.{}.length2")
    return [
        "uniform.signal",
        "uniform.length2",
        "floor",
        "concentration",
        "loss",
        "loss_error",
        *(f"correlation.{depth}" for depth in depths),
        *(part.format(pair) for part in ("gain.{}", *parts) for pair in pairs),
    ]

"""What a step of a `Sifter` does with a pool, as functions of its plan: score, judge, select, learn."""

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from earlysift import coverage, judging, pending, planning, pools, ranks, selectors
from earlysift.judging import Counted
from earlysift.planning import Plan
from earlysift.pools import Pool
from earlysift.ranks import Gathered
from earlysift.recent import Kept
from earlysift.runner import Runner
from earlysift.selectors import Selection


class Chosen(NamedTuple):
    """The selection of a step.

    Attributes:
        selection: The kept candidates.
        batch: Their rows, if they are at hand: the pool itself, or rows that came from other ranks. Else None.
        stands_for: Candidates that each of the kept stands for, ``(b,)``; None where that is unknown.
        weighs: Whether weights may differ from 1.
    """

    selection: Selection
    batch: Any
    stands_for: Tensor | None
    weighs: bool = False


class Scored(NamedTuple):
    """The scores of a step.

    Attributes:
        own: Of this rank's candidates.
        gathered: Of all that are selected from together, and how many of them each rank has.
        everywhere: Whether that is all ranks' candidates.
        counted: What is judged about them; pending on an accelerator.
        row: What the ledger is to note.
    """

    own: Tensor
    gathered: Gathered
    everywhere: bool
    counted: Counted
    row: dict[str, Any]


def padded(pool: Pool, runner: Runner) -> Pool:
    """The pool as long as the longest of all ranks."""
    with runner.ledger.timed("gather"):
        padded = ranks.pad_together(pool.data, runner.padding_token(), runner.device, runner.label_keys())
        return Pool(padded, pool.size)


def considered(pool: Pool, plan: Plan) -> Pool:
    """The candidates that are scored."""
    return pool if plan.considered == pool.size else pool.take(slice(0, plan.considered))


def score(pool: Pool, plan: Plan, runner: Runner) -> Scored | None:
    """Score the candidates, and gather the scores of all ranks if they are selected from together.

    Returns:
        The scores; None if the step needs none.
    """
    if plan.approximation is None:
        return None
    candidates = considered(pool, plan)
    key = (runner.config.seed, "score", plan.step, ranks.rank(), *((plan.micro_step,) if plan.micro_step else ()))
    runs_no_pass = plan.approximation.recalls and plan.approximation.measure is None
    filled = candidates if runs_no_pass else runner.filled_up(candidates, plan.rows)
    own = runner.score(filled, plan.approximation, plan.kept, key, plan.step)[: candidates.size]
    gathered, everywhere = Gathered(own, [candidates.size]), plan.everywhere
    if everywhere:
        with runner.ledger.timed("gather"):
            gathered = ranks.gather(own, candidates.data)
        if sum(gathered.sizes) < plan.kept * len(gathered.sizes):  # too few for all, as every rank knows
            gathered, everywhere = Gathered(own, [candidates.size]), False
    counts = judging.count(gathered.scores)
    if plan.probes or everywhere or plan.is_partial or runner.exit_optimizer is not None:
        counts = pending.arrived(counts)  # such a step waits anyway
    kept = min(plan.kept * len(gathered.sizes), len(gathered.scores))
    own_counts = pending.arrived(judging.count(own)) if everywhere else counts
    row = {"scored": candidates.size, "depth": plan.depth, **own_counts}
    return Scored(own, gathered, everywhere, Counted(plan.step, len(gathered.scores), kept, counts), row)


def judge(scored: Scored | None, plan: Plan, before: Mapping[str, int]) -> Counted | None:
    """Refuse scores that no batch can be chosen by.

    Args:
        scored: The scores, if there are any.
        plan: What is to be done with them; what is trained on whole is not chosen by its scores.
        before: Counts of the steps before, which have been warned of.

    Returns:
        What an accelerator has yet to count, to be judged later.
    """
    if scored is None or scored.counted.is_pending():
        return scored and scored.counted
    if scored.everywhere or not plan.is_partial:
        judging.require_usable(scored.counted, before)
    return None


def select(pool: Pool, scored: Scored | None, plan: Plan, runner: Runner) -> Chosen:
    """Choose b candidates."""
    everywhere = scored is not None and scored.everywhere
    if plan.is_partial and not everywhere:
        return whole_pool(pool, runner.device)
    if not plan.selects or scored is None:
        # In auto mode the first b, which is uniform if the pool is shuffled: see `Sifter.wanted`.
        offered = plan.kept if runner.config.mode == "auto" else pool.size
        chosen = selectors.uniform_subset(offered, plan.kept, plan.draws.own)
        selection = Selection(*(part.to(runner.device, non_blocking=True) for part in chosen))
        return Chosen(selection, None, torch.full((plan.kept,), offered / plan.kept))
    scores, kept = scored.gathered.scores, scored.counted.kept
    generator = plan.draws.shared if everywhere else plan.draws.own
    unbiased = plan.select is selectors.proportional
    drawn = 0 if unbiased else selectors.number_drawn(kept, runner.config.explored)
    stands_for = None
    with runner.ledger.timed("select"):
        guarded = selectors.drop_outliers(scores, runner.config.drop_outliers, kept)
        selection = plan.select(guarded, kept - drawn, generator)
        # To look at the numbers themselves waits for an accelerator: only those of a selector of the user's own.
        known = plan.select in planning.RULES.values()
        selectors.require_selection(selection, kept - drawn, len(guarded), look=not known)
        if drawn:
            selection, stands_for = selectors.explored(selection.indices, drawn, guarded, generator)
    batch = None
    if everywhere:
        with runner.ledger.timed("gather"):
            candidates = considered(pool, plan).data
            batch, selection = ranks.exchange(candidates, selection, scored.gathered.sizes, plan.kept)
    if stands_for is not None:
        stands_for = stands_for[selection.indices]
    elif unbiased:
        stands_for = selection.weights * (len(guarded) / kept)
    return Chosen(selection, batch, stands_for, weighs=plan.select not in selectors.UNWEIGHTED)


def whole_pool(pool: Pool, device: torch.device) -> Chosen:
    """A whole pool, weights 1."""
    ones = torch.ones(pool.size, device=device)
    return Chosen(Selection(torch.arange(pool.size, device=device), ones), pool.data, ones)


def learn(pool: Pool, scored: Scored | None, plan: Plan, runner: Runner) -> dict[str, float]:
    """Compare the scores with exact losses if that is due, and train the exit head or the probes if there are any.

    Returns:
        What `earlysift.fidelity.fidelity` returns, if scores were compared.
    """
    row: dict[str, float] = {}
    if scored is None:
        return row
    if plan.probes:
        row = runner.fidelity(runner.filled_up(pool, plan.rows), scored.own, plan.kept)
    if runner.exit_optimizer is not None:
        runner.train_exit(pool, scored.own, plan.kept)
    if plan.depth in runner.learnt.probes:
        with runner.ledger.timed("exit"):
            runner.learnt.probes[plan.depth].learn()
    return {} if plan.is_partial else row  # a partial pool is too small to learn from


def gather(pool: Pool, chosen: Chosen, runner: Runner) -> Any:
    """The batch: the selected rows, if they are not at hand, without padding that none of them needs, if it is cut."""
    with runner.ledger.timed("gather"):
        batch = pool.take(chosen.selection.indices).data if chosen.batch is None else chosen.batch
        return pools.trim_padding(batch) if runner.config.trim else batch


def counted(pool: Pool, chosen: Chosen) -> dict[str, Any]:
    """What the ledger is to note of the pool: its candidates, and those offered and kept of every group."""
    row: dict[str, Any] = {"candidates": pool.size}
    if pool.groups is not None:
        row["groups"] = pending.number(chosen.selection.indices, partial(coverage.counts, pool.groups.tolist()))
    return row


def remember(pool: Pool, scored: Scored | None, chosen: Chosen, step: int, runner: Runner) -> Kept:
    """What is known of the batch, to be completed by its losses."""
    indices = chosen.selection.indices
    blend = runner.learnt.blend
    return Kept(
        step,
        len(indices),
        None if pool.ids is None else pool.ids[indices.cpu()],
        None if scored is None else scored.gathered.scores[indices],
        chosen.stands_for,
        None if scored is None or blend is None or blend.latest is None else blend.latest[indices],
        chosen.selection.weights if chosen.weighs else None,
    )

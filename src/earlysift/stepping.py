"""What a step of a `Sifter` does with a pool, as functions of its plan: score, judge, select, learn."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from earlysift import judging, pending, planning, pools, ranks, selectors
from earlysift.judging import Counted
from earlysift.planning import Plan
from earlysift.pools import Pool
from earlysift.ranks import Gathered
from earlysift.runner import Runner
from earlysift.selectors import Selection


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
        return Pool(ranks.pad_together(pool.data, runner.padding_token(), runner.device), pool.size)


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
    filled = runner.filled_up(candidates, plan.rows)
    own = runner.score(filled, plan.approximation, plan.kept, key)[: candidates.size]
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


def select(pool: Pool, scored: Scored | None, plan: Plan, runner: Runner) -> tuple[Selection, Any]:
    """Choose b candidates.

    Returns:
        The selection; and the batch, if it is the pool itself or its rows came from other ranks, else None.
    """
    everywhere = scored is not None and scored.everywhere
    if plan.is_partial and not everywhere:
        return whole_pool(pool.size, runner.device), pool.data
    if not plan.selects or scored is None:
        # In auto mode the first b, which is uniform if the pool is shuffled: see `Sifter.wanted`.
        offered = plan.kept if runner.config.mode == "auto" else pool.size
        chosen = selectors.uniform_subset(offered, plan.kept, plan.draws.own)
        return Selection(*(part.to(runner.device, non_blocking=True) for part in chosen)), None
    scores, kept = scored.gathered.scores, scored.counted.kept
    with runner.ledger.timed("select"):
        guarded = selectors.drop_outliers(scores, runner.config.drop_outliers, kept)
        selection = plan.select(guarded, kept, plan.draws.shared if everywhere else plan.draws.own)
    # To look at the numbers themselves waits for an accelerator: only those of a selector of the user's own.
    known = plan.select in planning.RULES.values()
    selectors.require_selection(selection, kept, len(guarded), look=not known)
    if not everywhere:
        return selection, None
    with runner.ledger.timed("gather"):
        candidates = considered(pool, plan).data
        batch, selection = ranks.exchange(candidates, selection, scored.gathered.sizes, plan.kept)
    return selection, batch


def whole_pool(size: int, device: torch.device) -> Selection:
    """The selection of a whole pool, weights 1."""
    return Selection(torch.arange(size, device=device), torch.ones(size, device=device))


def learn(pool: Pool, scored: Scored | None, plan: Plan, runner: Runner) -> dict[str, float]:
    """Compare the scores with exact losses if that is due, and train the exit head if there is one.

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
    return {} if plan.is_partial else row  # a partial pool is too small to learn from


def gather(pool: Pool, selection: Selection, batch: Any, runner: Runner) -> Any:
    """The batch: the selected rows, if they are not at hand, without padding that none of them needs, if it is cut."""
    with runner.ledger.timed("gather"):
        batch = pool.take(selection.indices).data if batch is None else batch
        return pools.trim_padding(batch) if runner.config.trim else batch
